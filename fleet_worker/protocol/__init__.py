"""What two processes say to each other: JSON messages, each a frozen pydantic model.

May import: `errors`. Read in this order: `wire`, `openai`, `request`, `reply`, `vectors`, `control`, `status`,
`registry_event`.
"""
