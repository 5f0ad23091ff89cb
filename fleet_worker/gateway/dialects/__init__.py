"""The dialects: how each API asks, and how it is answered. They know no HTTP and no router, and wait for nothing.

In reading order:

- what they have in common: `dialect`, `client_body`, `chat_fields`, `tool_calls`
- OpenAI's: `openai_common`; `openai_chat`, `openai_completions`, `openai_embeddings`; `openai_responses` with the parts
  `openai_responses_input`, `openai_responses_tools`, `openai_responses_writer` and `openai_responses_items`
- Anthropic's: `anthropic_messages` with the parts `anthropic_request`, `anthropic_history`, `anthropic_tools` and
  `anthropic_answer`; `anthropic_count`
- Ollama's: `ollama_chat` and `ollama_generate` with the parts `ollama_request`, `ollama_fields` and `ollama_answer`;
  `ollama_embed`, `ollama_embeddings`; `ollama_models`
"""
