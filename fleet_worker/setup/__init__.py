"""How a host becomes part of a fleet: the commands init, config and service.

May import: everything except `cli`. Read in this order: `commands`, `config_option`, `config_commands`,
`config_example`, `config_check`, `config_show`, `config_sources`, `secrets`, `service_commands`, `local_servers`,
`local_models`, `found_instances`, `worker_file`.
"""
