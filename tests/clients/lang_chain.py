"""LangChain's models of OpenAI, over chat completions and over the Responses API."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("lang_chain_script.py")


CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
CLIENT = Client("langchain", ["langchain", "langchain-openai"], _run, CALLS, python=True)
