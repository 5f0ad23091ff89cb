"""The AI SDK with its provider for Anthropic, which checks every event of a stream by a schema."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("ai_sdk_anthropic.cjs")


CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
CLIENT = Client("ai-sdk-anthropic", ["ai", "@ai-sdk/anthropic", "zod"], _run, CALLS)
