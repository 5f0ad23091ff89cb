"""Codex CLI, OpenAI's coding agent. It knows nothing but `/v1/responses`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.clients.client import Client, Result, Target, check, expect

_RAN = "the fleet was here"
_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_CODER = "gpt-6-astra"


def _run(target: Target) -> Iterator[Result]:
    yield check("answers", lambda: _answers(target))
    yield check("goes on with a session", lambda: _goes_on(target))
    yield check("tells that a model is unknown", lambda: _unknown_model(target))
    if model := target.models.get("codex"):
        yield check("runs a command", lambda: _runs_a_command(target, model))
        yield check("shows an image", lambda: _shows_an_image(target, model))
    if coder := target.models.get(_CODER):
        yield check("runs code of a custom tool", lambda: _runs_code(target, coder))


def _answers(target: Target) -> str:
    events = _exec(target, target.models["text"], "Say hello.")
    usage = events[-1].get("usage") or {}
    expect(usage.get("output_tokens"), events[-1])
    return f"{_said(events)} ({usage['input_tokens']} tokens in, {usage['output_tokens']} out)"


def _goes_on(target: Target) -> str:
    _exec(target, target.models["text"], "Say hello.", ephemeral=False)
    return _said(_exec(target, target.models["text"], "And once more.", "resume", "--last", ephemeral=False))


def _unknown_model(target: Target) -> str:
    events = _exec(target, "no such model", "Say hello.", fails=True)
    told = [event for event in events if event["type"] in ("error", "turn.failed")]
    expect(told and "does not exist" in json.dumps(told[-1]), events)
    return json.dumps(told[-1])[:200]


def _runs_a_command(target: Target, model: str) -> str:
    events = _exec(target, model, "Run a command.")
    ran = [item for item in _items(events) if item["type"] == "command_execution"]
    expect(any(_RAN in item.get("aggregated_output", "") for item in ran), events)
    thoughts = [item["text"] for item in _items(events) if item["type"] == "reasoning"]
    return f"thought {thoughts}, ran {[item['command'] for item in ran]}, said {_said(events)}"


def _shows_an_image(target: Target, model: str) -> str:
    image = target.folder / "dot.png"
    image.write_bytes(base64.b64decode(_DOT))
    return _said(_exec(target, model, "What is it?", "--image", str(image), "--"))


def _runs_code(target: Target, model: str) -> str:
    """With this model it offers only custom tools in namespaces, as part of its input."""
    events = _exec(target, model, "Run some code.")
    ran = [item for item in _items(events) if item["type"] == "command_execution"]
    expect(any(_RAN in item.get("aggregated_output", "") for item in ran), events)
    return f"ran {[item['command'] for item in ran]}, said {_said(events)}"


def _exec(
    target: Target, model: str, prompt: str, *words: str, ephemeral: bool = True, fails: bool = False
) -> list[dict[str, Any]]:
    """Run one turn; return its events."""
    provider = f'{{name="fleet", base_url="{target.url}/v1", wire_api="responses", env_key="FLEET_KEY"}}'
    settings = ("model_provider=fleet", f"model_providers.fleet={provider}")
    flags = ["--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--model", model]
    given = [word for setting in settings for word in ("-c", setting)]
    codex = str(target.packages / "node_modules" / ".bin" / "codex")
    command = [codex, "exec", *flags, *given, *(["--ephemeral"] if ephemeral else []), *words, prompt]
    if fails:
        command = ["sh", "-c", '! "$@"', "sh", *command]
    printed = target.run(command, {"FLEET_KEY": target.key, "CODEX_HOME": str(_home(target))})
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def _home(target: Target) -> Path:
    home = target.folder / ".codex"
    home.mkdir(exist_ok=True)
    return home


def _items(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["item"] for event in events if event["type"] == "item.completed"]


def _said(events: list[dict[str, Any]]) -> str:
    said = [item["text"] for item in _items(events) if item["type"] == "agent_message"]
    expect(said and all(said), events)
    return said[-1]


CALLS = [{"name": "exec_command", "arguments": {"cmd": f"echo {_RAN}"}}]
_CODE = f'text(await tools.exec_command({{cmd: "echo {_RAN}"}}))'
CODE_CALLS = [{"name": "functions__exec", "arguments": {"input": _CODE}}]
CLIENT = Client("codex", ["@openai/codex"], _run, CALLS, {_CODER: CODE_CALLS})
