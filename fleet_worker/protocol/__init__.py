"""The messages between two processes: JSON, each a frozen pydantic model.

May import: `errors`. Read in this order: `wire` (what all messages have in common) with `refusals`, `request` with
`json_values`, `openai` (the bodies it carries) and `openai_fields`, `openai_older`, `openai_shapes`, `prompt_prefixes`,
`reply`, `status`, `registry_event`, `cache_digest`.
"""
