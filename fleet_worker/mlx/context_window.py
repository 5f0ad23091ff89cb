"""Finds how many tokens a model can read and write in one request, where nobody has said it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fleet_worker.mlx.model_folder import folder_of, folders_of, text_of
from fleet_worker.settings import Model

_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
"""Of `config.json`, the usual one first."""
_PARTS = ("text_config", "language_config", "llm_config")
"""In which models of several parts have the configuration of their text."""
_MOST = 100_000_000
"""Larger numbers say that there is no limit."""
_UNSCALED = {"default", "llama3", "longrope", "mrope", "su"}
"""Kinds of RoPE for which the number is that of the scaled model; for all others it is multiplied."""


def find_context_window(model: Model, backend: str, reported: Iterable[str]) -> int | None:
    """Return the number in the `config.json` beside the model, None if this machine does not have that.

    It is searched where the chat template is: in the folder or the repository that `chat_template` of the model's
    settings names, and in `folders_of` the model.
    """
    named = [folder_of(model.chat_template)] if model.chat_template else []
    return next((window for folder in [*named, *folders_of(backend, reported)] for window in _windows_in(folder)), None)


def _windows_in(folder: Path) -> Iterator[int]:
    try:
        whole: Any = json.loads(text_of(folder / "config.json") or "{}")
    except (ValueError, RecursionError):
        return
    for config in [whole, *(whole.get(part) for part in _PARTS)] if isinstance(whole, dict) else ():
        if isinstance(config, dict):
            for number in filter(None, (_window(config.get(key)) for key in _KEYS)):
                yield _scaled(number, config.get("rope_scaling"))


def _window(number: Any) -> int | None:
    return number if isinstance(number, int) and number is not True and 0 < number < _MOST else None


def _scaled(number: int, rope: Any) -> int:
    if not isinstance(rope, dict):
        return number
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind in _UNSCALED or not isinstance(factor, int | float) or not 1 < factor < 1000:
        return number
    return max(number, int((_window(rope.get("original_max_position_embeddings")) or number) * factor))
