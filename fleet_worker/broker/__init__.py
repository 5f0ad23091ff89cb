"""How we use Celery and kombu: the only room that knows their insides.

May import: `protocol`, `settings`, `errors`. Read in this order: `app`, `redis_transport`, `topology`, `connection`,
`reconnecting`, `presence`, `control_listener`, `control_commands`, `broker_clock`, `queue_depth`.
"""
