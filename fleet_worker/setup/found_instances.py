"""The instances of a host, from the MLX servers that run there, or from its models: what `init`, `join` and
`quickstart` propose."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import psutil

from fleet_worker.mlx.model_folder import folder_of
from fleet_worker.mlx.offering import embeds
from fleet_worker.settings import Capability
from fleet_worker.setup.local_models import LocalModel, that_fits
from fleet_worker.setup.local_servers import LocalServer
from fleet_worker.setup.worker_file import WorkerInstance

PROGRAM = "mlx_lm.server"
_MOST_MODELS = 20
"""Of one server; one with more lists a catalogue, of which its owner has to choose."""
_SLOTS = 4
_CHATS: tuple[Capability, ...] = ("chat", "stream_chat")


def memory() -> int:
    """Return the bytes of memory of this host."""
    return int(psutil.virtual_memory().total)


def has_program() -> bool:
    """Tell whether `mlx_lm.server` is beside this Python or on the PATH, where `fleet-worker up` finds it."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(PROGRAM, path=folders) is not None


def public_name(backend: str) -> str:
    """Return the name that callers use: "qwen3-14b-4bit" for mlx-community/Qwen3-14B-4bit, or for a folder."""
    return PurePath(backend).name.lower() or backend


def found_instances(
    servers: Sequence[LocalServer], models: Sequence[LocalModel], memory: int, *, model: str | None = None
) -> dict[str, WorkerInstance]:
    """Return an instance by name for each server whose models are known; without any, one with a `serve` line.

    `model` is the one that an mlx_lm.server was started with, if its command line does not say so; without a server,
    the one to serve, instead of the largest of `models` that fits into so many bytes of memory. Empty if there is no
    server, and no model or no `mlx_lm.server`.
    """
    usable = [each for server in servers if (each := of_server(server, model))]
    if not usable and not servers:
        chosen = that_fits(models, memory)
        name = model or (chosen.name if chosen else None)
        usable = [serving(name)] if name and has_program() else []
    return named(usable)


def named(instances: Sequence[WorkerInstance]) -> dict[str, WorkerInstance]:
    """Return instances by names: `local` and `embed`, then `local-2` and so on."""
    by_name: dict[str, WorkerInstance] = {}
    for instance in instances:
        kind = "embed" if instance.capabilities == ("embed",) else "local"
        numbered = (f"{kind}-{number}" if number > 1 else kind for number in range(1, len(instances) + 1))
        by_name[next(name for name in numbered if name not in by_name)] = instance
    return by_name


def of_server(
    server: LocalServer, model: str | None = None, *, concurrency: int | None = None
) -> WorkerInstance | None:
    """Return the instance of a server that runs; None if nothing tells which models it serves.

    mlx_lm.server has one model, which it calls `default_model`; what it lists it would have to load first.
    """
    if server.kind == "mlx_lm":
        known = server.started_with or model
        models = _started_with(known) if known else _only_one(server.models)
    else:
        listed = [model] if model else server.models if len(server.models) <= _MOST_MODELS else ()
        models = {public_name(each): {"backend": each} for each in listed}
    if not models:
        return None
    slots = concurrency or (1 if server.one_at_a_time or server.kind in ("openai", "omni") else _SLOTS)
    return WorkerInstance(base_url=server.url, models=models, concurrency=slots, capabilities=_capabilities(models))


def serving(model: str, *, concurrency: int | None = None) -> WorkerInstance:
    """Return an instance whose server, an mlx_lm.server with this model, `fleet-worker up` runs."""
    line = f"{PROGRAM} --model {shlex.quote(model)} --port {{port}}"
    return WorkerInstance(serve=line, models=_started_with(model), concurrency=concurrency or _SLOTS)


def _started_with(model: str) -> Mapping[str, Mapping[str, Any]]:
    return {public_name(model): {"backend": "default_model", "chat_template": model}}


def _only_one(listed: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """Return the only model of a cache, which is most probably the one that was loaded."""
    if len(listed) != 1:
        return {}
    is_here = folder_of(listed[0]).is_dir()
    return _started_with(listed[0]) if is_here else {public_name(listed[0]): {"backend": "default_model"}}


def _capabilities(models: Mapping[str, Any]) -> tuple[Capability, ...]:
    kinds = {embeds(name) for name in models}
    return (*(_CHATS if False in kinds else ()), *(("embed",) if True in kinds else ()))
