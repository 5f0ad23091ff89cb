"""The gateway: HTTP for any client of OpenAI, Anthropic or Ollama, in front of a router.

In reading order:

- the process: `commands`, `serve`, `listener`
- a request: `app` (paths, and what all have in common), `running`, `options` and `session_key` (what the router is
  told), `exchange` (through the router), `token_counts`, `problems` (what a client is told when something goes wrong),
  `json_text`
- what needs no model: `lookups`, `known_fleet`, `models`, `health`
- what is kept of a request: `facts`, `records`, `metrics`
- the rooms `http` (requests and answers as bytes), `dialects` (what each API says, and means) and `accounts` (who may
  use how much, and who has used what)
"""
