"""The processes of one host: `fleet-worker up` and its children, and the service that starts it.

May import: `protocol` and what is below it. Read in this order: `supervisor`, `up_server`, `up_socket`, `node_process`,
`child_process`, `parent_pipe`, `embedded_broker`, `variables`, `file_lock`, `service`, `service_files`, `launchd`,
`systemd`. The room `servers` runs MLX servers.
"""
