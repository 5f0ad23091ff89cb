"""An inference node: a Celery worker that serves one MLX server.

May import: `registry`, `host`, `mlx`, `broker`, `protocol`, `settings`, `errors`. Read in this order: `__main__`,
`worker`, `inference_node`, `server_discovery`, `node`, `new_settings`, `tasks`, `task_request`, `prompt_cache/`,
`router_clocks`, `confirmations`, `reply_writer`, `reply_publisher`, `outbox`, `reply_connection`, `replay_buffer`,
`running_attempts`, `offered_models`, `lane_consumer`, `consumer`, `health_monitor`, `readiness`, `server_fault`,
`router_presence`, `remote_control`, `restart_commands`, `host_link`, `lifecycle`, `name_claim`, `log_privacy`.
"""
