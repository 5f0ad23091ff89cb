"""Ollama's library for JavaScript."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("ollama_node.cjs")


CLIENT = Client("ollama-node", ["ollama"], _run, [{"name": "weather", "arguments": {"city": "Oslo"}}])
