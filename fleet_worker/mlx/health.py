"""What an MLX server says about itself: `/health` and `/v1/models`, in all the shapes that were seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.body import json_object
from fleet_worker.mlx.error_mapping import error_in
from fleet_worker.mlx.profiles import detect_server

MAX_HEALTH_BYTES = 1024 * 1024
MAX_MODELS_BYTES = 8 * 1024 * 1024
"""Enough for 10,000 models with 800 bytes each."""
_LONGEST_NAME = 256
_SICK = ("unhealthy", "unavailable", "loading", "error")


@dataclass(frozen=True, slots=True)
class Health:
    """What `GET /health` reports. Not reliable: real servers report 200 when their generation thread has died."""

    ready: bool
    server: str
    engine: str | None = None
    """The engine of vllm-mlx; "simple" has a single slot."""
    is_api: bool = field(default=True, compare=False)
    """False if it may be another program: it has no such route, or has one, and neither is said in JSON."""


def health_of(response: httpx.Response, content: bytes | bytearray) -> Health:
    """Return what this answer to `GET /health` says, whatever its status. A server without the route is ready, one that
    sends a web page instead is not."""
    found = json_object(content)
    report = found or {}
    server = detect_server(response.http_version, response.headers, report)
    is_missing = response.status_code == 404
    is_api = found is not None or not (response.is_success or is_missing)
    is_page = content.lstrip().startswith(b"<")
    is_well = response.is_success and not is_page and str(report.get("status")).lower() not in _SICK
    is_well = is_well and report.get("ready") is not False  # rapid-mlx, "healthy" while it loads or swaps its model
    engine = report.get("engine_type")
    return Health(
        is_well or is_missing, server, engine if isinstance(engine, str) and _is_name(engine) else None, is_api
    )


def model_ids(content: bytes | bytearray) -> list[str]:
    """Return the ids that this answer to `GET /v1/models` lists, each once. An empty body lists none.

    Raises:
        MalformedOutput: it is no list of models.
        FleetError: it is an error with status 200.
    """
    if not content:  # mlx_lm.server without a model cache on disk
        return []
    answer = json_object(content)
    if answer is None:
        raise MalformedOutput("the MLX server's list of models is not a JSON object")
    models = answer.get("data")
    if not isinstance(models, list):
        raise error_in(answer) or MalformedOutput("the MLX server's list of models is not a list")
    ids = [model.get("id") for model in models if isinstance(model, dict)]
    return list(dict.fromkeys(each for each in ids if isinstance(each, str) and _is_name(each)))


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_NAME and text.isprintable()
