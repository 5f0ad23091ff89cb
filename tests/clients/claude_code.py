"""Claude Code, Anthropic's coding agent. It knows nothing but `/v1/messages`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.clients.client import Client, Result, Target, check, expect

_MADE = "made.txt"
_TEXT = "the fleet was here"


def _run(target: Target) -> Iterator[Result]:
    text = target.models["text"]
    yield check("answers", lambda: _answers(target, text))
    yield check("goes on with a session", lambda: _goes_on(target, text))
    yield check("tells that a model is unknown", lambda: _unknown_model(target))
    if model := target.models.get("claude-code"):
        yield check("runs a command", lambda: _runs_a_command(target, model))


def _answers(target: Target, model: str) -> str:
    ended = _claude(target, model, "Say hello.")[-1]
    expect(ended["usage"]["output_tokens"], ended)
    expect(not ended["is_error"] and ended["result"], ended)
    return f"{ended['result']} ({ended['usage']['input_tokens']} tokens in, {ended['usage']['output_tokens']} out)"


def _goes_on(target: Target, model: str) -> str:
    first = _claude(target, model, "Say hello.")[-1]
    ended = _claude(target, model, "And once more.", "--resume", first["session_id"])[-1]
    expect(_read(ended) > _read(first), (first, ended))
    return str(ended["result"])


def _read(ended: dict[str, Any]) -> int:
    """The tokens of the prompt: Anthropic counts those that were cached apart from the others."""
    usage = ended["usage"]
    return int(usage["input_tokens"]) + int(usage["cache_read_input_tokens"])


def _unknown_model(target: Target) -> str:
    ended = _claude(target, "no such model", "Say hello.", fails=True)[-1]
    expect(ended["is_error"], ended)
    return str(ended["result"])


def _runs_a_command(target: Target, model: str) -> str:
    events = _claude(target, model, "Make a file.", "--allowedTools", "Bash")
    expect((target.folder / _MADE).read_text("utf-8").strip() == _TEXT, events)
    blocks = [block for event in events if event["type"] == "assistant" for block in event["message"]["content"]]
    kinds = [block["type"] for block in blocks]
    expect(kinds == ["thinking", "tool_use", "thinking", "text"], kinds)
    ran = next(block["input"]["command"] for block in blocks if block["type"] == "tool_use")
    return f"ran {ran!r}, which made {_MADE}, and said {events[-1]['result']}"


def _claude(target: Target, model: str, prompt: str, *words: str, fails: bool = False) -> list[dict[str, Any]]:
    """Run one turn; return its events."""
    env = {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_RETRIES": "0",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
    }
    claude = str(target.packages / "node_modules" / ".bin" / "claude")
    command = [claude, "-p", prompt, "--output-format", "stream-json", "--verbose", *words]
    if fails:
        command = ["sh", "-c", '! "$@"', "sh", *command]
    return [json.loads(line) for line in target.run(command, env).splitlines() if line.startswith("{")]


CALLS = [{"name": "Bash", "arguments": {"command": f"echo {_TEXT} > {_MADE}", "description": "Make a file"}}]
CLIENT = Client("claude-code", ["@anthropic-ai/claude-code"], _run, CALLS)
