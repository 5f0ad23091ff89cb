"""The messages between two processes: JSON, each a frozen pydantic model.

May import: `errors`. Read in this order: `wire` (what all messages have in common), `request` with `openai` (the bodies
it carries), `reply`, `status`, `registry_event`.
"""
