"""Find the MLX server of an instance, and wait until it is ready."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential, wait_random

from fleet_worker.errors import FleetError, InstanceUnavailable
from fleet_worker.mlx.client import DEFAULT_URLS, Health, MLXClient
from fleet_worker.settings import Instance

log = logging.getLogger(__name__)


def _find_server_of(instance: Instance, timeout: float) -> tuple[MLXClient, str, list[str]]:
    """Wait for the MLX server; return its client, what kind it is, and what it reports as its models.

    Raises:
        InstanceUnavailable: it did not become ready within `timeout` seconds.
    """
    url, health = _find_server(instance, timeout)
    server = health.server if instance.server == "auto" else instance.server
    client = MLXClient(instance, url, server=server)
    return client, server, _reported(client, instance)


def _reported(client: MLXClient, instance: Instance) -> list[str]:
    """Without it a node whose models are configured can begin all the same."""
    try:
        return client.models()
    except FleetError:
        if instance.models:
            return []
        raise


def _find_server(instance: Instance, timeout: float) -> tuple[str, Health]:
    urls = (instance.base_url,) if instance.base_url else DEFAULT_URLS

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            log.info("waits up to %g s for an MLX server at %s", timeout, " or ".join(urls))

    attempts = Retrying(
        before_sleep=tell,
        retry=retry_if_exception_type(InstanceUnavailable),
        stop=stop_after_delay(timeout),
        wait=wait_exponential(multiplier=0.1, max=2.0) + wait_random(max=0.1),
        reraise=True,
    )
    return attempts(_ready_server, instance, urls, timeout)


def _ready_server(instance: Instance, urls: Sequence[str], timeout: float) -> tuple[str, Health]:
    for url in urls:
        if health := _health(instance, url):
            return url, health
    where = " or ".join(urls)
    raise InstanceUnavailable(
        f"no MLX server became ready at {where} within {timeout:g} s: start it, or correct base_url"
    )


def _health(instance: Instance, url: str) -> Health | None:
    client = MLXClient(instance, url)
    try:
        health = client.health()
    except FleetError:
        return None
    finally:
        client.close()
    return health if health.ready else None
