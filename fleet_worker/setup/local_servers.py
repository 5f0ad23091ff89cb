"""Finds the MLX servers that run on this host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace

import httpx
import psutil

from fleet_worker.errors import FleetError, RequestTimeout, Unauthorized
from fleet_worker.gateway.models import OWNER
from fleet_worker.mlx.client import MLXClient
from fleet_worker.settings import Instance, ServerTimeouts

PORTS = (8000, 8080, 8081, 8082, 8083, 1234, 10240, 11434)
"""mlx_lm.server 8080 and the next ones, LM Studio 1234, mlx-omni-server 10240, Ollama 11434, others 8000."""
WITHIN = 2.0
"""Seconds for all ports."""


@dataclass(frozen=True, slots=True)
class LocalServer:
    """An MLX server that answers: its URL, its kind as in `instances.X.server`, and the models that it lists.

    `models` is empty if it wants a key. What mlx_lm.server lists is the disk cache: only `started_with` is loaded.
    """

    url: str
    kind: str
    models: tuple[str, ...] = ()
    started_with: str = ""
    """The model in the command line of mlx_lm.server; empty if that cannot be read."""
    wants_key: bool = False
    one_at_a_time: bool = False
    """Whether it runs one request at a time, as the simple engine of vllm-mlx."""


def local_servers(ports: Iterable[int] = PORTS, *, within: float = WITHIN) -> list[LocalServer]:
    """Return the MLX servers that answer on these ports of 127.0.0.1 within so many seconds, in this order."""
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    pool = ThreadPoolExecutor(max(len(urls), 1), "local-servers")
    asked = [pool.submit(server_at, url, within=within) for url in urls]
    wait(asked, within)
    pool.shutdown(wait=False)
    return [found for each in asked if each.done() and (found := each.result())]


def server_at(url: str, *, within: float = WITHIN) -> LocalServer | None:
    """Return the MLX server at a URL of this host; None if none answers within so many seconds.

    Other programs answer there, too. A server of an unknown kind has to list a model. One of a known kind, which says
    so in its headers or its `/health`, may also refuse to, or be late: it may want a key, or be busy.
    """
    timeouts = ServerTimeouts(connect=within / 2)  # for each of the two requests
    with closing(MLXClient(Instance(clocks=timeouts), url)) as client:
        try:
            health = client.identify()
        except FleetError:
            return None
        kind = health.server
        found = LocalServer(url, kind, one_at_a_time=health.engine == "simple")
        try:
            models = client.models()
        except (Unauthorized, RequestTimeout) as error:
            return replace(found, wants_key=isinstance(error, Unauthorized)) if kind != "openai" else None
        except FleetError:
            return None
    if kind == "openai" and (not models or _is_gateway(url, within / 2)):
        return None
    return replace(found, models=tuple(models), started_with=_model_of(url) if kind == "mlx_lm" else "")


def _is_gateway(url: str, within: float) -> bool:
    """Tell whether a gateway of a fleet answers there, by whom it calls the owner of its models: a node that served it
    would send requests in a circle."""
    try:
        listed = httpx.get(f"{url}/v1/models", timeout=within, trust_env=False).json()["data"]
        return any(model.get("owned_by") == OWNER for model in listed)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _model_of(url: str) -> str:
    """Return the model in the command line of the mlx_lm.server on the port of this URL; empty if none is found."""
    port = url.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):  # without those of other users, on macOS
        words = process.info["cmdline"] or []
        if any("mlx_lm" in word for word in words) and option_of("--port", words, "8080") == port:
            return option_of("--model", words)
    return ""


def option_of(name: str, words: Sequence[str], default: str = "") -> str:
    """Return the value of an option of a command line, as in `--port 8080` or `--port=8080`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return default
