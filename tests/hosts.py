"""Several hosts on this one: each a `fleet-worker up` that manages one simulated MLX server."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from fleet_worker import Router
from fleet_worker.host.child_process import python
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import worker_toml
from tests.brokers import free_port
from tests.fleets import READY_WITHIN, until
from tests.ups import running_up


class Hosts:
    """So many hosts, `mini-0`, `mini-1` ..., with an instance `local` each. `server` are options of its MLX server.

    All serve one model, of a name that no other fleet has. `Load` and `Crowd` of `tests.fleets` take it for a fleet.
    Running requests have `grace` seconds.
    """

    def __init__(
        self, broker_url: str, number: int, *, slots: int = 4, natural: int = 20, grace: float = 30.0, **server: Any
    ) -> None:
        self.model = f"sim-{uuid.uuid4().hex[:8]}"
        self.names = [f"mini-{each}" for each in range(number)]
        self.natural = natural
        self._broker_url, self._slots, self._grace = broker_url, slots, grace
        options = {"model": self.model, "tokens": natural, **server}
        flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self._serve = shlex.join([*python("-m", "fleet_worker.simulator"), *flags]) + " --port {port}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
            self.ups = {name: stack.enter_context(self._up(name)) for name in self.names}
            for name, up in self.ups.items():
                up.wait_for(f"local@{name} is ready", READY_WITHIN)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_until_ready(self, router: Router) -> None:
        ready = router.registry.offerings
        until(lambda: len(ready(self.model, ready=True)) == len(self.names), READY_WITHIN)

    def run(self, *command: str, within: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run `fleet-worker ...` beside them, to its end."""
        env = {**os.environ, "FLEET_BROKER_URL": self._broker_url, "FLEET_CONFIG": ""}
        line = python("-m", "fleet_worker", *command)
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=within, check=False)

    def expected(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> str:
        return "".join(reply_tokens(messages, max_tokens, tokens=self.natural))

    def _up(self, name: str) -> Any:
        folder = self._folder / name
        folder.mkdir()
        instance = {
            "serve": self._serve,
            "base_url": f"http://127.0.0.1:{free_port()}",
            "models": {self.model: {}},
            "limits": {"concurrency": self._slots},
        }
        config = folder / "worker.toml"
        head = {"host": name, "state_dir": str(folder), "broker_url": self._broker_url}
        lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
        worker = ["[worker]", f"drain_grace = {self._grace}"]
        config.write_text("\n".join([*lines, *worker, worker_toml("local", instance)]), "utf-8")
        config.chmod(0o600)
        return running_up(python("-m", "fleet_worker", "--config", str(config), "up"))
