"""What two processes say to each other: JSON messages, each a frozen pydantic model.

May import: `errors`. Read in this order: `base`, `openai`, `request`, `reply`, `vectors`, `control`, `status`,
`registry_event`.
"""
