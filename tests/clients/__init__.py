"""Programs that talk to OpenAI, Anthropic or Ollama, run against a gateway: `python -m tests.clients`.

`__main__` (options, report), `packages` (installs them), `own_fleet` (a simulated one, with a gateway), `client` (what
is known of a client); then each client in a file of its own: `openai_node`, `ai_sdk`, `agents_sdk`,
`lang_chain`, `codex`, `opencode`; `anthropic_node`, `ai_sdk_anthropic`, `claude_code`; `ollama_node`;
`lang_chain_others`. A library needs a script beside it, which its own interpreter runs.
"""
