"""The chat template of a model, where it can be found, and made to leave the last turn open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_worker.settings import Model

_HUB = "~/.cache/huggingface/hub"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The Jinja text of a model's own template; some models have another one for requests with tools."""

    default: str
    tool_use: str


def chat_template(model: Model, backend: str, reported: Iterable[str]) -> ChatTemplate | None:
    """Return the model's own template, or None if this machine does not have it.

    It lies beside the model, in the folder or in the Hugging Face cache that `chat_template` of the model's settings
    names, or else `backend`; `chat_template` may also be its file. For `default_model` that is the folder which the
    server, by what it `reported`, names by an absolute path: the one of its command line.
    """
    if model.chat_template is None and backend == "default_model":
        names = [name for name in reported if Path(name).is_absolute()]
    else:
        names = [model.chat_template or backend]
    return next(filter(None, map(_template_at, names)), None)


def left_open(template: str, *, before: str = "") -> str:
    """Return a template that renders all messages but the last as `template` does, and then the bare text of the last.

    For a template that is rendered with `add_generation_prompt`: the text stands where the answer begins. `before` is
    text that goes in between. The line breaks are as transformers' Jinja needs them: it drops the one after a block
    tag (`trim_blocks`), and the last one of a template.
    """
    return (
        "{% set all_messages = messages %}{% set messages = all_messages[:-1] %}\n"
        + template.removesuffix("\n")
        + f'{{{{ {json.dumps(before)} + all_messages[-1]["content"] }}}}'
    )


def _template_at(name: str) -> ChatTemplate | None:
    """Of a file, a folder or a model of the Hugging Face cache."""
    path = Path(name).expanduser()
    if text := _text(path):
        return ChatTemplate(text, text)
    return _template_in(path if path.is_dir() else _snapshot(name))


def _snapshot(repository: str) -> Path:
    """The folder of the Hugging Face cache that holds the main revision of this repository, if any does."""
    home = os.environ.get("HF_HOME")
    hub = Path(os.environ.get("HF_HUB_CACHE") or (f"{home}/hub" if home else _HUB)).expanduser()
    model = hub / f"models--{repository.replace('/', '--')}"
    return model / "snapshots" / (_text(model / "refs" / "main") or "none").strip()


def _template_in(folder: Path) -> ChatTemplate | None:
    """As transformers reads it: a file of its own counts more than a key of the tokenizer's configuration."""
    try:
        config: Any = json.loads(_text(folder / "tokenizer_config.json") or "{}")
        if "chat_template_type" in config:  # mlx_lm renders these in Python
            return None
        said = _text(folder / "chat_template.jinja") or config.get("chat_template")
        texts = {each["name"]: each["template"] for each in said} if isinstance(said, list) else {"default": said}
        more = _text(folder / "additional_chat_templates" / "tool_use.jinja")
        found = ChatTemplate(texts["default"], more or texts.get("tool_use", texts["default"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if isinstance(found.default, str) and isinstance(found.tool_use, str) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError):  # ValueError: no path at all
        return None
