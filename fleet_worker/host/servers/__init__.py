"""The MLX servers that `fleet-worker up` runs itself: those of instances with `serve`.

Read in this order: `managed_server`, `restart_policy`, `server_command`, `server_process`, `process_family`, `memory`,
`server_output`, `server_port`, `port_owner`, `custody`, `server_record`, `guard`, `leftovers`.
"""
