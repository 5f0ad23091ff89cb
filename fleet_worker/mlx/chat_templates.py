"""Finds the chat template of a model, and changes it so that it leaves the last turn open."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_worker.settings import Model

_MOST_FOLDERS = 100
"""Of those that a server reports."""
_HUB = "~/.cache/huggingface/hub"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The Jinja text of a model's own template. Some models have another one for requests with tools."""

    default: str
    tool_use: str


def with_open_last_turn(template: str, *, before_text: str = "") -> str:
    """Return a template that renders all messages but the last as `template` does, and then the bare text of the last.

    With `add_generation_prompt`, the text stands where the answer begins, after `before_text`. The line breaks are as
    transformers' Jinja needs them: it drops the one after a block tag (`trim_blocks`), and the last one of a template.
    """
    return (
        "{% set all_messages = messages %}{% set messages = all_messages[:-1] %}\n"
        + template.removesuffix("\n")
        + f'{{{{ {json.dumps(before_text)} + all_messages[-1]["content"] }}}}'
    )


def find_chat_template(model: Model, backend: str, reported: Iterable[str]) -> ChatTemplate | None:
    """Return the model's own template, or None if this machine does not have it.

    It is searched beside the model: in the folder or the Hugging Face repository that `chat_template` of the model's
    settings names, or else `backend`; `chat_template` may also be the file itself. The folder of `default_model` is the
    one in the server's command line, which is the absolute path among the models that the server `reported`.
    """
    if model.chat_template is not None:
        return _template_at(model.chat_template)
    names = [backend]
    if backend == "default_model":
        names = [name for name in reported if name.startswith("/")][:_MOST_FOLDERS]
    # A server may report any name, "/etc/passwd" too: only a folder's own template is read, never the path itself.
    return next(filter(None, (_template_in(_folder(name)) for name in names)), None)


def _template_at(name: str) -> ChatTemplate | None:
    if text := _text(Path(name)):
        return ChatTemplate(text, text)
    return _template_in(_folder(name))


def _folder(name: str) -> Path:
    """Return the folder of this name, or else the one of a repository of this name in the cache."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    return _snapshot(name)


def _snapshot(repository: str) -> Path:
    """Return the folder of the Hugging Face cache for the main revision of this repository; it may not exist."""
    home = os.environ.get("HF_HOME")
    hub = Path(os.environ.get("HF_HUB_CACHE") or (f"{home}/hub" if home else _HUB)).expanduser()
    model = hub / f"models--{repository.replace('/', '--')}"
    return model / "snapshots" / (_text(model / "refs" / "main") or "none").strip()


def _template_in(folder: Path) -> ChatTemplate | None:
    """Read it as transformers does: a separate file comes before a key of the tokenizer's configuration."""
    try:
        config: Any = json.loads(_text(folder / "tokenizer_config.json") or "{}")
        if "chat_template_type" in config:  # mlx_lm renders these in Python
            return None
        found = _text(folder / "chat_template.jinja") or config.get("chat_template")
        texts = {each["name"]: each["template"] for each in found} if isinstance(found, list) else {"default": found}
        tool_use = _text(folder / "additional_chat_templates" / "tool_use.jinja") or texts.get("tool_use")
        template = ChatTemplate(texts["default"], tool_use or texts["default"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return template if isinstance(template.default, str) and isinstance(template.tool_use, str) else None


def _text(path: Path) -> str | None:
    try:
        return path.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError, RuntimeError):  # not a valid path, or of an unknown user
        return None
