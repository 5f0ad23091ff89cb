"""`fleet-worker up`: it starts the processes of its host, and restarts what ends.

May import: `servers`, `availability` and the files of `host`. Read in this order: `supervisor`, `event_loop`,
`hosted_instance`, `server_plan`, `companions`, `programs`, `owner`, `switchboard`, `up_server`.
"""
