"""How we use Celery and kombu: the only room that knows their insides.

May import: `protocol`, `settings`, `errors`. Read in this order: `app`, `redis_transport`, `amqp_transport`,
`topology`, `refusal`, `connection`, `outage`, `reconnecting`, `presence`, `control_listener`, `queue_depth`.
"""
