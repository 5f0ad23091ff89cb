"""The chat template of a model, where it can be found, and made to leave the last turn open."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fleet_worker.offerings import Offering

__all__ = ["chat_template", "left_open"]

log = logging.getLogger(__name__)

_HUB = "~/.cache/huggingface/hub"


def chat_template(offering: Offering, listed: Callable[[], Iterable[str]], *, tools: bool) -> str | None:
    """Return the Jinja text of the model's own template, or None if this machine does not have it.

    It is what `chat_template` of the model's settings names; else it lies beside the model, in the folder or in the
    Hugging Face cache that `backend` names. For `default_model` that is the folder which the server, asked for its
    models by `listed`, names by an absolute path: the one of its command line.
    """
    named = offering.settings.chat_template
    if named:
        template = _text(named.expanduser())
    else:
        found = (_template_in(folder, tools=tools) for folder in _folders(offering.backend, listed))
        template = next(filter(None, found), None)
    if not template:
        log.warning(
            "no chat template of %s is found, so no answer of it can be continued here: name its file as chat_template",
            offering.model,
        )
    return template


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


def _folders(backend: str, listed: Callable[[], Iterable[str]]) -> Iterable[Path]:
    if backend == "default_model":
        return (Path(name) for name in listed() if Path(name).is_absolute())
    folder = Path(backend).expanduser()
    return [folder if folder.is_dir() else _snapshot(backend)]


def _snapshot(repository: str) -> Path:
    """The folder of the Hugging Face cache that holds the main revision of this repository, if any does."""
    home = os.environ.get("HF_HOME")
    hub = Path(os.environ.get("HF_HUB_CACHE") or (f"{home}/hub" if home else _HUB)).expanduser()
    model = hub / f"models--{repository.replace('/', '--')}"
    return model / "snapshots" / (_text(model / "refs" / "main") or "none").strip()


def _template_in(folder: Path, *, tools: bool) -> str | None:
    """As transformers reads it: a file of its own counts more than a key of the tokenizer's configuration."""
    try:
        config: Any = json.loads(_text(folder / "tokenizer_config.json") or "{}")
        if "chat_template_type" in config:  # mlx_lm renders these in Python
            return None
        template = _text(folder / "chat_template.jinja") or config.get("chat_template")
        if isinstance(template, list):
            texts = {each["name"]: each["template"] for each in template}
            template = texts.get("tool_use" if tools else "default") or texts.get("default")
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("the tokenizer_config.json of a model cannot be read: its answers cannot be continued")
        return None
    return template if isinstance(template, str) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
