"""Finds models for MLX servers in the local Hugging Face cache, without mlx and huggingface_hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are all here. `size` is the bytes of its weights, which is about the memory that it takes."""

    name: str
    """As in mlx-community/Qwen3-14B-4bit."""
    kind: Literal["chat", "embedding"]
    size: int
    folder: Path


def local_models(hub: Path | None = None) -> list[LocalModel]:
    """Return the models in the cache (default: the one that HF_HOME or HF_HUB_CACHE names), the largest first."""
    return []


def that_fits(models: Sequence[LocalModel], memory: int) -> LocalModel | None:
    """Return the largest chat model that a host with so many bytes of memory can serve; None if there is none."""
    return None
