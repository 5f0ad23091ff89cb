"""The status of all instances: reported by nodes, published by registry nodes, known to routers.

May import: `host`, `broker`, `mlx`, `protocol`, `settings`, `errors`. Read in this order: `status_socket`, `node`,
`host_watch`, `beat`, `publisher`, `digests`, `view`, `offered`, `absence`, `alternatives`, `memory_bound`, `counters`,
`prometheus`.
"""
