"""Finds the MLX servers that run on this host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PORTS = (8000, 8080, 8081, 8082, 8083, 1234, 10240, 11434)
"""mlx_lm.server 8080, vllm-mlx and others 8000, LM Studio 1234, mlx-omni-server 10240, Ollama 11434."""
WITHIN = 2.0
"""Seconds for all ports."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """An MLX server that answers: its URL, its kind as in `instances.X.server`, and the models that it lists."""

    url: str
    kind: str
    models: tuple[str, ...]


def local_servers(ports: Iterable[int] = PORTS, *, within: float = WITHIN) -> list[LocalServer]:
    """Return the MLX servers that answer on these ports of 127.0.0.1 in time, in the order of the ports."""
    return []
