"""The instances of a new worker.toml: of the MLX servers that run here, of a model in the cache, or as options name
them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import psutil

from fleet_worker.errors import ConfigurationError
from fleet_worker.mlx.model_folder import folder_of
from fleet_worker.mlx.offering import embeds
from fleet_worker.settings import Capability
from fleet_worker.setup.first_host import free_port
from fleet_worker.setup.local_models import LocalModel, local_models, that_fits
from fleet_worker.setup.local_servers import LocalServer, local_servers, option_of, server_at
from fleet_worker.setup.worker_file import WorkerInstance

PROGRAM = "mlx_lm.server"
SERVER_PORT = 8080
"""Of a managed server whose base_url is not set."""
_EXAMPLE = "mlx-community/Qwen3-4B-Instruct-2507-4bit"
_MOST_MODELS = 20
"""Of one server; one with more lists a catalogue, of which its owner has to choose."""
_SLOTS = 4
_CHATS: tuple[Capability, ...] = ("chat", "stream_chat")


def local_instances(model: str | None = None) -> dict[str, WorkerInstance]:
    """Return an instance by name for each MLX server that runs on this host; without any, one that `up` starts, with
    the model of that name, or with the largest one in the local Hugging Face cache that fits into the memory.

    Raises:
        ConfigurationError: there is nothing. It says what to do.
    """
    servers = local_servers()
    models = [] if servers else local_models()
    found = found_instances(servers, models, memory(), model=model)
    if not found:
        raise ConfigurationError(_unknown(servers[0]) if servers else _nothing(models, model))
    return {name: with_free_port(instance) for name, instance in found.items()}


def _unknown(server: LocalServer) -> str:
    if server.wants_key:
        return f"the server at {server.url} wants a key: write the file by fleet-worker init, and the key into it"
    return f"the server at {server.url} does not say which model it was started with: add --model NAME"


def _nothing(models: Sequence[LocalModel], model: str | None) -> str:
    if model or any(each.kind == "chat" for each in models):
        if not has_program():
            return f"no MLX server runs on this host, and {PROGRAM} is not installed: pip install mlx-lm"
        return (
            "no MLX server runs on this host, and each model in its cache needs more memory than it has: --model NAME"
        )
    return (
        "no MLX server runs on this host, and its Hugging Face cache has no model for one. Start a server, or download "
        f"a model and run this again:\n\n  pip install mlx-lm huggingface_hub\n  hf download {_EXAMPLE}"
    )


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


def of_url(url: str, model: str | None) -> WorkerInstance:
    """Return the instance of a server that runs at a URL, with the model of that name or those that it lists.

    Raises:
        ConfigurationError: there is no MLX server, or it does not say what it serves, and `model` is not given.
    """
    server = server_at(url)
    if found := server and of_server(server, model):
        return found
    if model:
        return WorkerInstance(base_url=url, models={public_name(model): {"backend": model}})
    if not server:
        raise ConfigurationError(f"no MLX server answers at {url}: start it, or name its model too: --model NAME")
    lists = "wants a key" if server.wants_key else "does not say which model it was started with"
    raise ConfigurationError(f"the server at {url} {lists}: add --model NAME")


def of_command(line: str, model: str | None) -> WorkerInstance:
    """Return the instance of a server that `fleet-worker up` starts by this command line.

    Its model is the one of that name, or else the value of `--model` in the command line.

    Raises:
        ConfigurationError: the command line cannot be split into words, or names no model, and `model` is not given.
    """
    try:
        words = shlex.split(line)
    except ValueError:
        raise ConfigurationError("--serve has a quote that is not closed, or ends with a backslash") from None
    model = model or option_of("--model", words)
    if not model:
        raise ConfigurationError("--serve names no model: add --model NAME")
    if any("mlx_lm" in word for word in words):
        return replace(serving(model), serve=line)
    return WorkerInstance(serve=line, models={public_name(model): {"backend": model}})


def of_server(server: LocalServer, model: str | None = None) -> WorkerInstance | None:
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
    slots = 1 if server.one_at_a_time or server.kind in ("openai", "omni") else _SLOTS
    return WorkerInstance(base_url=server.url, models=models, concurrency=slots, capabilities=_capabilities(models))


def serving(model: str) -> WorkerInstance:
    """Return an instance whose server, an mlx_lm.server with this model, `fleet-worker up` runs."""
    line = f"{PROGRAM} --model {shlex.quote(model)} --port {{port}}"
    return WorkerInstance(serve=line, models=_started_with(model), concurrency=_SLOTS)


def with_free_port(instance: WorkerInstance) -> WorkerInstance:
    """Return the instance with an address of its own if another program has the usual port of its managed server."""
    if not instance.serve or instance.base_url:
        return instance
    port = free_port(SERVER_PORT, everywhere=False)
    return instance if port == SERVER_PORT else replace(instance, base_url=f"http://127.0.0.1:{port}")


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


def named(instances: Sequence[WorkerInstance]) -> dict[str, WorkerInstance]:
    """Return instances by names: `local` and `embed`, then `local-2` and so on."""
    by_name: dict[str, WorkerInstance] = {}
    for instance in instances:
        kind = "embed" if instance.capabilities == ("embed",) else "local"
        numbered = (f"{kind}-{number}" if number > 1 else kind for number in range(1, len(instances) + 1))
        by_name[next(name for name in numbered if name not in by_name)] = instance
    return by_name


def described(instance: WorkerInstance) -> str:
    """Return a short description, for a terminal."""
    models = ", ".join(list(instance.models)[:5])
    return f"{models}, whose server fleet-worker up starts" if instance.serve else f"{models} at {instance.base_url}"


def public_name(backend: str) -> str:
    """Return the name that callers use: "qwen3-14b-4bit" for mlx-community/Qwen3-14B-4bit, or for a folder."""
    return PurePath(backend).name.lower() or backend


def has_program() -> bool:
    """Tell whether `mlx_lm.server` is beside this Python or on the PATH, where `fleet-worker up` finds it."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(PROGRAM, path=folders) is not None


def memory() -> int:
    """Return the bytes of memory of this host."""
    return int(psutil.virtual_memory().total)
