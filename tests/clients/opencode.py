"""opencode, a coding agent that is made of the AI SDK and speaks chat completions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.clients.client import Client, Result, Target, check, expect

_RAN = "the fleet was here"


def _run(target: Target) -> Iterator[Result]:
    yield check("answers", lambda: _said(_exec(target, target.models["text"], "Say hello.")))
    if model := target.models.get("opencode"):
        yield check("runs a command", lambda: _runs_a_command(target, model))


def _runs_a_command(target: Target, model: str) -> str:
    events = _exec(target, model, "Run a command.")
    outputs = [event["part"]["state"].get("output", "") for event in events if event["type"] == "tool_use"]
    expect(any(_RAN in output for output in outputs), events)
    return f"ran a command, said {_said(events)}"


def _exec(target: Target, model: str, prompt: str) -> list[dict[str, Any]]:
    """Run one session; return its events."""
    options = {"baseURL": f"{target.url}/v1", "apiKey": target.key}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "fleet", "options": options, "models": {model: {}}}
    config = {
        "provider": {"fleet": provider},
        "small_model": f"fleet/{model}",
        "autoupdate": False,
        "share": "disabled",
    }
    opencode = str(target.packages / "node_modules" / ".bin" / "opencode")
    command = [opencode, "run", "--pure", "--auto", "--format", "json", "--model", f"fleet/{model}", prompt]
    env = {"OPENCODE_CONFIG_CONTENT": json.dumps(config), "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    return [json.loads(line) for line in target.run(command, env).splitlines() if line.startswith("{")]


def _said(events: list[dict[str, Any]]) -> str:
    said = [event["part"]["text"] for event in events if event["type"] == "text"]
    expect(said and all(said), events)
    return said[-1]


CALL = {"name": "bash", "arguments": {"command": f"echo {_RAN}", "description": "Says who was here"}}
CLIENT = Client("opencode", ["opencode-ai"], _run, [CALL])
