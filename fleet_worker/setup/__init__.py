"""How a host becomes part of a fleet: the commands quickstart, invite, join, init, config and service.

May import: everything except `cli`. Read in this order: `commands`, `config_option`, `config_commands`,
`config_check`, `config_faults`, `config_show`, `config_sources`, `service_commands`, `init_command`, `options`,
`join_commands`, `next_steps`, `quickstart`, `foreground`, `welcome`, `first_host`, `invite`, `own_names`,
`single_use`, `invitation`, `join`, `instances`, `local_servers`, `local_models`, `worker_file`.
"""
