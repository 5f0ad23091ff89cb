"""Programs that talk to OpenAI or Anthropic, run against a gateway: `python -m tests.clients`."""

from tests.mlx_clients import *  # noqa: F403  until all branches know the new name
