"""The gateway: HTTP for any client of OpenAI or Anthropic, in front of a router.

In reading order:

- the process: `commands`, `serve`, `listener`, `http_protocol` with `http_refusals`
- a request: `app` (paths, and what all have in common), `running`, `browsers`, `request`, `options`, `exchange`
  (through the router), `departure`, `event_stream`, `response`, `problems` (what a client is told when something goes
  wrong); what costs no mini anything: `lookups`, `known_fleet`, `models`, `health`
- who may use what: `keys` with `key`; `quotas` with `quota_texts`, `counts`, `shared_counts` and `count_scripts`
- what was used: `facts`, `records`, `ledger` with `ledger_file`, `metrics`, `usage`
- the dialects, which are pure: `dialect` (what they have in common), `openai_chat`, `openai_completions`,
  `openai_embeddings`, `openai_responses` with its parts `openai_responses_...`, `anthropic_messages` with the parts
  `anthropic_request`, `anthropic_history`, `anthropic_tools` and `anthropic_answer`, `anthropic_count`;
  `ollama_chat` and `ollama_generate` with the parts `ollama_request`, `ollama_fields` and `ollama_answer`,
  `ollama_embed`, `ollama_embeddings`, `ollama_models`; `client_body`, `tool_calls`, `token_counts`, `json_text`
"""
