"""The dialects: how each API asks, and how it is answered. Pure: no HTTP, no router, nothing to wait for.

In reading order: `dialect` (what they have in common), with `client_body` and `tool_calls`; OpenAI's: `openai_chat`,
 `openai_completions`, `openai_embeddings`, `openai_responses` with the parts `openai_responses_...`;
Anthropic's: `anthropic_messages` with the parts `anthropic_request`, `anthropic_history`, `anthropic_tools` and
`anthropic_answer`, and `anthropic_count`; Ollama's: `ollama_chat` and `ollama_generate` with the parts
`ollama_request`, `ollama_fields` and `ollama_answer`, `ollama_embed`, `ollama_embeddings`, `ollama_models`.
"""
