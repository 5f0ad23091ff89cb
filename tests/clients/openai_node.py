"""OpenAI's SDK for JavaScript."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    env = {"URL": f"{target.url}/v1", "KEY": target.key, "MODELS": json.dumps(dict(target.models))}
    return target.run_node("openai_node.cjs", env)


CLIENT = Client("openai-node", ["openai", "zod"], _run, [{"name": "weather", "arguments": {"city": "Oslo"}}])
