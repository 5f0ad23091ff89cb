"""How a host becomes part of a fleet: the commands init, config and service.

May import: everything except `cli`. Read in this order: `commands`, `config_option`, `service_commands`,
`local_servers`, `local_models`, `worker_file`.
"""
