"""The processes of one host: `fleet-worker up` and its children, and the service that starts it.

May import: `protocol` and what is below it. Read in this order: `supervisor`, `hosted_instance`, `server_plan`,
`node_process`, `companions`, `programs`, `owner`, `switchboard`, `up_server`, `up_socket`, `event_loop`,
`embedded_broker`, `child_process`, `parent_pipe`, `variables`, `unserved`, `file_lock`, `lossy_output`, `service`,
`service_files`, `account`, `launchd`, `systemd`. The room `servers` runs MLX servers, `availability`
watches the owner of the host.
"""
