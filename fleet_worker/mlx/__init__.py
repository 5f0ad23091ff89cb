"""The HTTP client of one MLX server. Knows no broker.

May import: `protocol`, `settings`, `errors`. Read in this order: `client`, `request_body`, `profiles`, `transport`,
`timeouts`, `cancellation`, `chat_stream`, `sse`, `chunks`, `reasoning`, `error_mapping`, `resume`, `overlap`,
`chat_templates`, `embeddings`; then what an instance offers: `offering`, `features`.
"""
