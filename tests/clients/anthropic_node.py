"""Anthropic's SDK for JavaScript."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("anthropic_node.cjs")


CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
CLIENT = Client("anthropic-node", ["@anthropic-ai/sdk", "zod"], _run, CALLS)
