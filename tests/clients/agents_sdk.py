"""OpenAI's Agents SDK for Python. By itself it speaks the Responses API."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("agents_sdk_script.py")


CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
CLIENT = Client("agents-sdk", ["openai-agents"], _run, CALLS, python=True)
