"""Gateways for tests: real processes that serve HTTP."""

from contextlib import contextmanager

from fleet_worker.host.child_process import child, python

READY_WITHIN = 20.0


@contextmanager
def running_gateway(broker_url, **settings):
    """Run `fleet-worker gateway` with these settings; yield its process, which has its `url`."""
    env = {f"FLEET_GATEWAY__{name.upper()}": str(value) for name, value in {"port": 0, **settings}.items()}
    with child("gateway", python("-m", "fleet_worker", "gateway"), {"FLEET_BROKER_URL": broker_url, **env}) as process:
        line = process.wait_for("serves http", READY_WITHIN)
        process.url = line.split("serves ")[1].split()[0]
        process.wait_for("knows the models", READY_WITHIN)
        yield process
