"""The library that submits requests and reads their replies.

May import: `registry`, `broker`, `protocol`, `settings`, `errors`. Read in this order: `router`, `options`,
`submission`, `call`, `session`, `in_flight`, `readers`, `attempts`, `progress`, `effects`, `blame`, `node_selection`,
`admission`, `queue_wait`, `submitter`, `control_publisher`, `reply_consumer`, `reply_buffer`, `wakeups`, `scheduler`,
`idempotency`.
"""
