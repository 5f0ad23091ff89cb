"""The gateway: HTTP for any client of OpenAI or Anthropic, in front of a router.

In reading order: `serve` (the process), `app` (paths and headers), `request_body`, `keys` with `key`, `quotas`,
`quota_texts`, `counts`, `shared_counts` and `count_scripts` (what each client may use), `exchange` (one request
through the router), `responses` (writing HTTP); the dialects, which are pure: `dialect` (what they have in common),
`openai_chat`, `openai_completions`, `openai_embeddings`, `openai_responses` (of which `openai_responses_input`,
`openai_responses_tools`, `openai_responses_writer` and `openai_responses_items` are parts), `anthropic_messages` (of
which `anthropic_request`, `anthropic_history`, `anthropic_tools` and `anthropic_answer` are parts), `anthropic_count`,
with `tool_calls`, `token_estimate` and `json_text`; `problems` (what a client is told when something goes wrong).
"""
