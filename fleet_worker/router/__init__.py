"""The library that submits requests and reads their replies.

May import: `registry`, `broker`, `mlx`, `protocol`, `settings`, `errors`. Read in this order: `router`, `options`,
`submission`, `call`, `session`, `in_flight`, `readers`, `attempts`, `transcript`, `progress`, `effects`, `deaths`,
`blame`, `route`, `node_selection`, `affinity` (a room of its own), `queue_watch`, `absence_watch`, `prompt_caches`,
`digest_consumer`, `first_digests`, `warm_ups`, `context_length`, `admission`, `queue_wait`, `submitter`,
`control_publisher`, `reply_consumer`, `reply_buffer`, `wakeups`, `scheduler`, `idempotency`.
"""
