"""How we use Celery and kombu: the only room that knows their insides.

May import: `protocol`, `settings`, `errors`. Read in this order: `app`, `door` (what is done with every message before
kombu or Celery interpret it), `redis_transport` with `bounded_socket`, `amqp_transport` with `amqp_socket`, `tls`,
`async_redis`, `topology`, `faults`, `connection`, `outage`, `replies`, `reconnecting`, `presence`, `control_listener`,
`control_commands`, `broker_clock`, `queue_depth`, `rehearsal`.
"""
