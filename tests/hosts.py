"""Several minis of one model, which is of a name that no other fleet has."""

from __future__ import annotations

import os
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
from tests.fleets import READY_WITHIN, until
from tests.minis import SLOTS, Mini


class Hosts:
    """So many, `mini-0`, `mini-1` ... `server` are options of their MLX servers.

    `Load` and `Crowd` of `tests.fleets` take it for a fleet. Running requests have `grace` seconds.
    """

    def __init__(
        self, broker_url: str, number: int, *, slots: int = SLOTS, natural: int = 20, grace: float = 30.0, **server: Any
    ) -> None:
        self.model = f"sim-{uuid.uuid4().hex[:8]}"
        self.names = [f"mini-{each}" for each in range(number)]
        self.natural = natural
        self._broker_url, self._slots, self._grace = broker_url, slots, grace
        options = {"tokens": natural, **server}.items()
        self._options = [word for name, value in options for word in (f"--{name.replace('_', '-')}", str(value))]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp")))
            minis = [stack.enter_context(self._mini(folder / name, name).up()) for name in self.names]
            for mini in minis:
                mini.process.wait_for(f"local@{mini.name} is ready", READY_WITHIN)
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

    def _mini(self, folder: Path, name: str) -> Mini:
        folder.mkdir()
        worker = f"[worker]\ndrain_grace = {self._grace}\n"
        mini = Mini(folder, name, self._broker_url, worker, model=self.model, slots=self._slots)
        mini.configure(*self._options)
        return mini
