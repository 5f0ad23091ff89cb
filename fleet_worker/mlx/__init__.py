"""The HTTP client of one MLX server. Knows no broker.

May import: `protocol`, `settings`, `errors`. What an instance offers is in `offering`, with `context_window`. Read the
client in this order: `client`, `profiles`, `parameters`, `transport`, `http_response`, `timeouts`, `activity`, `body`,
`health`, `chat_stream`, `events`, `chunks`, `half_characters`, `tool_calls`, `reasoning`, `enforcement`,
`stop_strings`, `json_schema`, `embeddings`, `error_mapping`; then how a stream is continued: `resume`, `overlap`,
`chat_templates`, `model_folder`.
"""
