"""What is where, and whether it works: published by each host, known by each router.

May import: `broker`, `mlx`, `protocol`, `settings`, `errors`. Read in this order: `node`, `status_socket`, `publisher`,
`view`, `counters`, `prometheus`.
"""
