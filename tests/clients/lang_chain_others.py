"""LangChain's models of Anthropic and of Ollama."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import Client, Result, Target


def _run(target: Target) -> Iterator[Result]:
    return target.run_script("lang_chain_others_script.py")


CALLS = [{"name": "weather", "arguments": {"city": "Oslo"}}]
PACKAGES = ["langchain", "langchain-anthropic", "langchain-ollama"]
CLIENT = Client("langchain-others", PACKAGES, _run, CALLS, python=True)
