"""A real Flower process that tests look at as a browser and a script would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from fleet_worker.host.child_process import ChildProcess, child, python

ROOT = Path(__file__).parent.parent
AUTH = ("operator", "let-me-in")


class Flower:
    """Flower at `url`, asked with its password."""

    def __init__(self, process: ChildProcess, url: str) -> None:
        self.process = process
        self.url = url
        self._http = httpx.Client(base_url=url, auth=AUTH, trust_env=False, timeout=20)

    def close(self) -> None:
        self._http.close()

    def page(self, path: str) -> str:
        response = self._http.get(path)
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
        return response.text

    def api(self, path: str) -> Any:
        return json.loads(self.page(f"/api/{path}"))

    def post(self, path: str) -> int:
        """Return the status of a request that would change something."""
        return self._http.post(path).status_code

    def rows(self) -> list[dict[str, Any]]:
        """What the script in /tasks fetches to fill its table."""
        path = "/tasks/datatable?draw=1&start=0&length=1000&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
        return json.loads(self.page(path))["data"]

    def ended(self, task_id: str) -> dict[str, Any]:
        """Return what is known of a task, once it has ended: Flower hears of it a moment after the caller."""
        self.eventually(lambda: self.api("tasks").get(task_id, {}).get("state") in ("SUCCESS", "FAILURE"))
        return self.api(f"task/info/{task_id}")

    def alive(self) -> set[str]:
        """The workers that /workers shows as online."""
        workers = json.loads(self.page("/workers?json=1"))["data"]
        return {worker["hostname"] for worker in workers if worker["status"]}

    def wait_for_workers(self, *names: str) -> None:
        """Return once Flower hears the events of these workers and has inspected them: it misses what was before."""
        self.eventually(lambda: self.alive() >= set(names))
        self.eventually(lambda: self.api("workers?refresh=1").keys() >= set(names))

    def eventually(self, holds: Callable[[], object], timeout: float = 15) -> None:
        """Return when it holds. Flower pushes nothing, so it can only be asked again."""
        for attempt in Retrying(
            stop=stop_after_delay(timeout),
            wait=wait_fixed(0.05),
            retry=retry_if_exception_type(AssertionError),
            reraise=True,
        ):
            with attempt:
                assert holds()


def composed_commands() -> list[list[str]]:
    """The commands in docker/compose.yaml, which are written so that no YAML parser is needed to read them."""
    text = (ROOT / "docker" / "compose.yaml").read_text("utf-8")
    return [json.loads(command) for command in re.findall(r"^ +command: (\[.*?\])$", text, re.DOTALL | re.MULTILINE)]


def composed_options() -> list[str]:
    """The options of Flower in docker/compose.yaml."""
    return next(command for command in composed_commands() if "flower" in command)[4:]


@contextmanager
def running_flower(broker_url: str, **settings: str) -> Iterator[Flower]:
    """Flower as in docker/compose.yaml, for this machine only; its configuration is that of a router: no instance.
    `settings` are variables for it."""
    environment = {
        "FLEET_CONFIG": str(ROOT / "config" / "router.toml"),
        "FLEET_BROKER_URL": broker_url,
        "FLOWER_BASIC_AUTH": ":".join(AUTH),
        **settings,
    }
    here = ["--address=127.0.0.1", "--port=0"]  # the last one counts
    command = python("-m", "celery", "-A", "fleet_worker", "flower", *composed_options(), *here)
    with child("Flower", command, environment) as process:
        line = process.wait_for("Visit me at ", 30)
        flower = Flower(process, line.split("Visit me at ")[1].strip())
        try:
            yield flower
        finally:
            flower.close()
