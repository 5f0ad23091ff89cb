"""The memory of the processes of a small fleet that has answered one request, and their CPU seconds until then.

    python -m tests.benchmarks.memory [--runs 3]

In an environment for development they take more than in that of a user: libraries import others if these are there.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from fleet_worker.host.child_process import child, python
from fleet_worker.simulator import SimulatedMLX
from fleet_worker.testing import embedded_broker, running_host, worker_toml
from tests.benchmarks.table import Row, main
from tests.benchmarks.usage import cpu_seconds, pss_mb, rss_mb
from tests.gateways import running_gateway
from tests.ups import running_up

WITHIN = 60.0
TARGETS = {"router": "<= 60", "node": "<= 60", "registry node": "<= 60"}
ROUTER = """
import signal
from fleet_worker import Router
with Router() as router:
    router.chat("m", [{"role": "user", "content": "Hi"}])
    print("answered", flush=True)
    signal.pause()
"""
BARE = """
import os
from celery import Celery
app = Celery(broker=os.environ["FLEET_BROKER_URL"])
@app.task(name="nothing")
def nothing():
    pass
app.worker_main(["worker", "-P", "threads", "-c", "1", "-Q", "nothing", "--loglevel", "INFO"])
"""
"""A Celery worker with one empty task."""


def processes() -> list[Row]:
    with ExitStack() as stack:
        url, server = stack.enter_context(embedded_broker()), stack.enter_context(SimulatedMLX(models=["m"]))
        instance = {"base_url": server.base_url, "models": {"m": {}}}
        host = stack.enter_context(running_host(url, {"local": instance}, ready_within=WITHIN))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-memory-"))
        config = Path(folder, "worker.toml")
        config.write_text(worker_toml("other", instance), "utf-8")
        env = {"FLEET_BROKER_URL": url, "FLEET_CONFIG": str(config), "FLEET_STATE_DIR": folder, "FLEET_HOST": "other"}
        up = stack.enter_context(running_up(python("-m", "fleet_worker", "up"), env))
        up.wait_for("is ready, 1 slot", WITHIN)
        router = stack.enter_context(child("router", python("-c", ROUTER), env))
        router.wait_for("answered", WITHIN)
        bare = stack.enter_context(child("bare worker", python("-c", BARE), env))
        bare.wait_for("ready.", WITHIN)
        gateway = stack.enter_context(running_gateway(url))
        found = {"node": host["local"], "registry node": host["registry"], "router": router, "gateway": gateway}
        found |= {"up": up, "bare Celery worker": bare}
        return [row for name, process in found.items() for row in _rows(name, process.pid)]


def _rows(name: str, pid: int) -> list[Row]:
    return [
        Row(name, "memory (RSS)", TARGETS.get(name, ""), rss_mb(pid), "MB"),
        Row(name, "of that its own (PSS)", "", pss_mb(pid), "MB"),
        Row(name, "CPU", "", cpu_seconds(pid), "s"),
    ]


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a process that finds no bytecode takes 7 MB more to compile
    main(__doc__, {"processes": processes})
