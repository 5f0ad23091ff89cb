"""The AI SDK, which most agents written in JavaScript are made of: its provider for OpenAI, which speaks the Responses
API, and its provider for whatever is compatible with chat completions."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("ai_sdk.cjs")


PACKAGES = ["ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"]
CLIENT = Client("ai-sdk", PACKAGES, _run, [{"name": "weather", "arguments": {"city": "Oslo"}}])
