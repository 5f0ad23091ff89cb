"""Finds the chat template of a model, and changes it so that it leaves the last turn open."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet_worker.mlx.model_folder import folder_of, folders_of, text_of
from fleet_worker.settings import Model


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
    settings names, or else in `folders_of` the model; `chat_template` may also be the file itself.
    """
    if model.chat_template is not None:
        return _template_at(model.chat_template)
    return next(filter(None, map(_template_in, folders_of(backend, reported))), None)


def _template_at(name: str) -> ChatTemplate | None:
    if text := text_of(Path(name)):
        return ChatTemplate(text, text)
    return _template_in(folder_of(name))


def _template_in(folder: Path) -> ChatTemplate | None:
    """Read it as transformers does: a separate file comes before a key of the tokenizer's configuration."""
    try:
        config: Any = json.loads(text_of(folder / "tokenizer_config.json") or "{}")
        if "chat_template_type" in config:  # mlx_lm renders these in Python
            return None
        found = text_of(folder / "chat_template.jinja") or config.get("chat_template")
        texts = {each["name"]: each["template"] for each in found} if isinstance(found, list) else {"default": found}
        tool_use = text_of(folder / "additional_chat_templates" / "tool_use.jinja") or texts.get("tool_use")
        template = ChatTemplate(texts["default"], tool_use or texts["default"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return template if isinstance(template.default, str) and isinstance(template.tool_use, str) else None
