"""The processes of one host: `fleet-worker up` and its children, and the service that starts it.

May import: `settings`, `config_file`, `exit_codes`, `urls`, `errors`. Read in this order: `supervisor`, `node_process`,
`child_process`, `parent_pipe`, `embedded_broker`, `variables`, `file_lock`, `service`, `service_files`,
`launchd`, `systemd`.
"""
