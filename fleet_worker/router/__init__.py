"""The library that submits requests and reads their replies.

May import: `registry`, `broker`, `protocol`, `settings`, `errors`. Read in this order: `router`, `options`, `call`,
`session`, `in_flight`, `readers`, `attempts`, `transcript`, `effects`, `blame`, `node_selection`, `admission`,
`submitter`, `control_publisher`, `reply_consumer`, `reply_buffer`, `wakeups`, `scheduler`, `idempotency`.
"""
