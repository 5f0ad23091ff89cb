"""Checks of the MLX servers of this host: they answer, and match the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from urllib.parse import urlsplit

from fleet_worker.errors import FleetError, RequestTimeout, Unauthorized
from fleet_worker.mlx.client import DEFAULT_URLS, MLXClient
from fleet_worker.mlx.health import Health
from fleet_worker.mlx.offering import Offering, no_offerings_advice, offerings_of
from fleet_worker.mlx.profiles import PROFILES, lacks_template
from fleet_worker.ops.findings import Finding, at_once
from fleet_worker.ops.managed_checks import silent_server, start_problems
from fleet_worker.settings import Instance, Settings
from fleet_worker.urls import is_loopback

ANSWER_WITHIN = 5.0  # seconds
WITHIN = 3 * ANSWER_WITHIN + 2
"""Seconds for one instance: two default URLs, and a list of models."""


def instances(settings: Settings) -> list[Finding]:
    """Check all instances that have opted in, in parallel, so that a silent server does not delay the others."""
    serving = {f"instances.{name}": each for name, each in settings.instances.items() if each.opted_in}
    return at_once({title: partial(_instance, title, each, settings) for title, each in serving.items()}, WITHIN)


def _instance(title: str, instance: Instance, settings: Settings) -> Iterator[Finding]:
    silent = []
    name = title.partition(".")[2]
    problems = list(start_problems(settings, name)) if instance.serve else []
    for url in (instance.base_url,) if instance.base_url else DEFAULT_URLS:
        with closing(MLXClient(_with_short_timeout(instance), url)) as client:
            try:
                health = client.identify()
            except FleetError as error:
                silent.append(f"{url}: {_describe(error)}")
                continue
            yield from _server(instance, url, health)
            yield from _models(title, instance, settings.features, client, health)
            yield from problems
            return
    if instance.serve:
        yield from problems or silent_server(settings, name, "; ".join(silent))
        return
    advice = "start the MLX server, restart it if it is frozen, or correct base_url"
    yield Finding("error", "; ".join(silent), advice)


def _with_short_timeout(instance: Instance) -> Instance:
    connect = min(instance.clocks.connect, ANSWER_WITHIN)
    return instance.model_copy(update={"clocks": instance.clocks.model_copy(update={"connect": connect})})


def _describe(error: FleetError) -> str:
    return "the MLX server does not answer in time" if isinstance(error, RequestTimeout) else error.message


def _server(instance: Instance, url: str, health: Health) -> Iterator[Finding]:
    name = " ".join(filter(None, (health.server, health.engine)))
    if health.ready:
        verified = "; chain and host name of its certificate are verified" if url.startswith("https:") else ""
        yield Finding("ok", f"{name} server at {url} answers{verified}")
    else:
        advice = "restart it, unless it is loading a model: mlx_lm.server stays so when its generation thread has died"
        yield Finding("error", f"{name} server at {url} says that it is not ready", advice)
    yield from exposure(url)
    yield from identity(instance.server, health.server)
    if instance.limits.concurrency > 1 and (health.engine == "simple" or instance.server == "omni"):
        found = f"{instance.limits.concurrency} slots for a server that runs one request at a time"
        advice = "set limits.concurrency = 1, or start vllm-mlx with --continuous-batching"
        yield Finding("warning", found, advice)


def exposure(url: str) -> Iterator[Finding]:
    """Check the protection of a server that is not on this host."""
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        found = "no TLS: everyone on the network can read requests, answers and api_key"
        advice = "put a proxy with TLS in front of it, and set an https:// base_url; ca names the file of its CA"
        yield Finding("warning", found, advice)


def identity(configured: str, detected: str) -> Iterator[Finding]:
    """Compare the configured kind of server with the detected one, which is `openai` if the kind is not recognised."""
    if configured in ("auto", detected) or (configured == "omni" and detected == "openai"):
        return
    found = f'server = "{configured}" is configured, but it'
    advice = 'correct it, or leave it out: "auto" detects it'
    if detected == "openai":
        yield Finding("warning", f"{found} cannot be recognised", "correct it, unless a proxy is in front of it")
    else:
        yield Finding("error", f"{found} is {detected}", advice)


def _models(
    title: str, instance: Instance, provider: Mapping[str, bool], client: MLXClient, health: Health
) -> Iterator[Finding]:
    """Compare the configured models with those that the server reports, if this kind of server reports the truth."""
    try:
        reported = client.models()
    except FleetError as error:
        serious = isinstance(error, Unauthorized) or not instance.models
        found = f"its list of models cannot be read: {_describe(error)}"
        yield Finding("error" if serious else "warning", found, "read its log")
        return
    kind = health.server if instance.server == "auto" else instance.server
    offered = offerings_of(instance, provider, reported)
    if not offered:
        found = "there is nothing to offer, so its node cannot start"
        yield Finding("error", found, no_offerings_advice(title, instance))
    elif not instance.models:
        found = f"no models are listed: {len(offered)} of the {len(reported)} that the server reports would be served"
        advice = f"list them under [{title}.models]: a server may report models that it would have to load or download"
        yield Finding("warning", found, advice)
    if kind == "mlx_lm" and any("embed" in offering.capabilities for offering in offered.values()):
        found = "mlx_lm.server has no embeddings: requests for them would fail"
        advice = 'leave "embed" out of fleet.capabilities, or set usage.embedding = false'
        yield Finding("warning", found, advice)
    backends = {name: model.backend or name for name, model in instance.models.items()}
    yield from _backends(kind, backends, reported)
    if instance.models:
        yield from (_no_template(title, each) for each in offered.values() if lacks_template(each, PROFILES[kind]))


def _backends(kind: str, backends: Mapping[str, str], reported: Sequence[str]) -> Iterator[Finding]:
    if kind in ("mlx_lm", "omni") and len(set(backends.values())) > 1:
        found = "several backends on a server that holds one model: it reloads at every change of model"
        yield Finding("warning", found, "keep one, and start a server of its own for each of the others")
    for model, backend in backends.items():
        if backend in reported:
            continue
        if kind in ("vllm_mlx", "mlx_openai"):
            found = f"the server does not have the backend {backend!r} of model {model!r}"
            yield Finding("warning", found, f"correct it; the server has {', '.join(map(repr, reported[:8]))}")
        elif kind == "mlx_lm" and backend != "default_model":
            found = f"the server does not list the backend {backend!r} of model {model!r}: it may load or download it"
            yield Finding("warning", found, 'backend = "default_model" is what the server was started with')


def _no_template(title: str, offering: Offering) -> Finding:
    model, named = offering.model, offering.settings.chat_template
    fault = f"is not found by chat_template = {named!r}" if named else "is not found"
    found = f"the chat template of model {model!r} {fault}: interrupted streams are resumed here only at temperature 0"
    advice = (
        f"under [{title}.models.{model!r}] set chat_template to what the server was started with: the folder of the "
        "model, or its name in the Hugging Face cache of this user; or to a file with the Jinja template"
    )
    return Finding("warning", found, advice)
