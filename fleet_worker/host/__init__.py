"""The processes of one host: `fleet-worker up` and its children, and the service that starts it.

May import: `protocol` and what is below it. The room `up` is `fleet-worker up` itself, `servers` runs MLX servers for
it, and `availability` watches whether the owner needs the host. Beside them, in reading order:

- the processes and what they hold: `child_process`, `node_process`, `parent_pipe`, `file_lock`, `private_file`,
  `lossy_output`, `state_socket`
- how others talk to `up`: `up_socket`
- the broker of a small fleet: `embedded_broker`
- what in a configuration may be a mistake: `variables`, `unserved`
- the service that starts `up` with the machine: `service`, `service_files`, `account`, `launchd`, `log_bound`,
  `systemd`
"""
