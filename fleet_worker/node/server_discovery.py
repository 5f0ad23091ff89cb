"""Finds the MLX server of an instance, and waits until it is ready."""

from __future__ import annotations

import logging
from contextlib import closing, suppress
from dataclasses import dataclass

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential, wait_random

from fleet_worker.errors import FleetError, InstanceUnavailable
from fleet_worker.mlx.client import DEFAULT_URLS, MLXClient
from fleet_worker.mlx.health import Health
from fleet_worker.settings import Instance

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """An MLX server that was found: its client, its kind (a key of `PROFILES`), and the models that it lists."""

    client: MLXClient
    kind: str
    models: list[str]


def find_server(instance: Instance, timeout: float) -> Server:
    """Wait for the MLX server of an instance.

    Raises:
        InstanceUnavailable: none became ready within `timeout` seconds.
        FleetError: it lists no models, and the settings list none either.
    """
    urls = (instance.base_url,) if instance.base_url else DEFAULT_URLS

    def log_first(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            log.info("waits up to %g s for an MLX server at %s", timeout, " or ".join(urls))

    attempts = Retrying(
        before_sleep=log_first,
        retry=retry_if_exception_type(InstanceUnavailable),
        stop=stop_after_delay(timeout),
        wait=wait_exponential(multiplier=0.1, max=2.0) + wait_random(max=0.1),
        reraise=True,
    )
    url, health = attempts(_ready_server, instance, urls, timeout)
    kind = health.server if instance.server == "auto" else instance.server
    client = MLXClient(instance, url, server=kind)
    try:
        return Server(client, kind, client.models())
    except FleetError:
        if instance.models:  # the node can begin without the server's list
            return Server(client, kind, [])
        raise


def _ready_server(instance: Instance, urls: tuple[str, ...], timeout: float) -> tuple[str, Health]:
    for url in urls:
        with suppress(FleetError), closing(MLXClient(instance, url)) as client:
            health = client.identify()
            if health.ready:
                return url, health
    where = " or ".join(urls)
    raise InstanceUnavailable(
        f"no MLX server became ready at {where} within {timeout:g} s: start it, or correct base_url"
    )
