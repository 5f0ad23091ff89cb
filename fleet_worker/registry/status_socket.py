"""What the inference nodes of a host tell its registry node: a line of JSON every second, over a Unix socket.

Not over the broker: it has to be known here that a node died even when the broker is away, and thousands of hosts
must not tell theirs there every second. Both ends are here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fleet_worker.errors import ConfigurationError
from fleet_worker.mlx.offering import Offering

log = logging.getLogger(__name__)

REPORT_EVERY = 1.0
SILENT_AFTER = 3.5
"""Seconds without a report after which a node counts as frozen."""
LONGEST_LINE = 1024 * 1024


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)


class ReportedModel(_Part):
    """One model that a node offers. `available` is False if its server turned out not to have it."""

    model: str
    capabilities: list[str]
    features: list[str]
    limits: dict[str, int]
    available: bool = True


class NodeReport(_Part):
    """What one inference node is at the moment; ages are seconds, `tally` is that of `tally.py`."""

    node: str
    instance: str
    pid: int
    version: str
    server: str
    status: str
    reason: str
    slots: int
    running: int
    tokens_per_second: float
    last_token_age: float | None
    reply_lag: float
    """The longest time that a frame waited for the broker since the last report."""
    lanes: list[str]
    models: list[ReportedModel]
    tally: dict[str, Any]


def reported_model(offering: Offering, *, available: bool = True) -> ReportedModel:
    """An offering as it is reported."""
    limits = {"context_window": offering.settings.context_window, "dimensions": offering.settings.dimensions}
    if "embed" not in offering.capabilities:
        limits["max_output_tokens"] = offering.settings.max_output_tokens
    return ReportedModel(
        model=offering.model,
        capabilities=list(offering.capabilities),
        features=[name for name, feature in offering.features.items() if feature.value],
        limits={name: value for name, value in limits.items() if value},
        available=available,
    )


def socket_path(state_dir: Path, host: str) -> Path:
    """Where the registry node of this host listens.

    Raises:
        ConfigurationError: the path is longer than a Unix socket's may be.
    """
    path = state_dir / f"{host}.sock"
    if len(os.fsencode(path)) > 100:  # 104 on macOS, 108 on Linux
        raise ConfigurationError("state_dir: the path is too long for a socket in it, choose a shorter one")
    return path


class Reporter:
    """The node's end: one thread that sends `report()` every second, and at once after `tell()`.

    Without a registry node nothing happens, and nothing is kept: the next report says it all.
    """

    def __init__(self, path: Path, report: Callable[[], NodeReport]) -> None:
        self._path = path
        self._report = report
        self._news = threading.Event()
        self._closed = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="fleet-reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self) -> None:
        """Something changed: do not wait for the next second."""
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._send()
            except OSError:
                self._hang_up()
            except Exception as error:
                log.error("a report could not be made (%s)", type(error).__name__)
            self._news.wait(REPORT_EVERY)
            self._news.clear()
        self._hang_up()

    def _send(self) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(REPORT_EVERY)
            self._socket.connect(str(self._path))
        self._socket.sendall(self._report().model_dump_json().encode() + b"\n")

    def _hang_up(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None


class Reports:
    """The registry node's end: the last report of every node that is alive. `changed` is called when one comes, or
    says another status, lanes or models, or when a node is gone.
    """

    def __init__(self, path: Path, changed: Callable[[], None]) -> None:
        self._path = path
        self._changed = changed
        self._lock = threading.Lock()
        self._reports: dict[socket.socket, NodeReport] = {}
        self._socket = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="fleet-reports", daemon=True)
        self._thread.start()

    def __call__(self) -> dict[str, NodeReport]:
        """By instance; of a node that has connected again, what the newer connection says."""
        with self._lock:
            return {report.instance: report for report in self._reports.values()}

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._read, args=(connection,), name="fleet-report", daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        """One thread for each node; its end, its silence and its nonsense all mean that the node is gone."""
        node = ""
        try:
            with connection, connection.makefile("rb") as lines:
                connection.settimeout(SILENT_AFTER)
                while line := lines.readline(LONGEST_LINE):
                    report = NodeReport.model_validate_json(line)
                    node = report.node
                    self._take(connection, report)
        except (OSError, ValidationError) as error:
            log.warning("%s: its reports ended (%s)", node or "a node", type(error).__name__)
        if node:
            with self._lock:
                self._reports.pop(connection, None)
            self._changed()

    def _take(self, connection: socket.socket, report: NodeReport) -> None:
        with self._lock:
            before = self._reports.get(connection)
            self._reports[connection] = report
        if before is None or _what_matters(before) != _what_matters(report):
            self._changed()


def _what_matters(report: NodeReport) -> tuple[Any, ...]:
    return report.status, report.reason, report.lanes, report.models


def _listen(path: Path) -> socket.socket:
    """Raises `ConfigurationError` if another registry node of this host listens already, or nobody can there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"state_dir: there can be no such folder ({error.strerror})") from None
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except TimeoutError:
            listening.close()
            raise ConfigurationError("a registry node runs already on this host, and is frozen") from None
        except OSError:
            path.unlink(missing_ok=True)  # left behind by one that was killed
        else:
            listening.close()
            raise ConfigurationError("a registry node runs already on this host")
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen(64)
    return listening
