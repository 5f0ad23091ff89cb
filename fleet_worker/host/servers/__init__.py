"""The MLX servers that `fleet-worker up` runs itself, those of instances with `serve`; and its broker, in the same way.

May import: the files of `host`. Read in this order: `managed_server`, `server_run`, `restart_policy`, `server_command`,
`server_process`, `process_family`, `memory`, `server_output`, `server_port`, `port_owner`, `custody`, `server_record`,
`guard`, `leftovers`.
"""
