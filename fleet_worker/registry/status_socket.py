"""How the inference nodes of a host report to its registry node: a line of JSON every second, over a Unix socket.

Not over the broker: the registry node must notice that a node died even while the broker is away, and the broker need
not carry a message per node and second. Both ends are here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from fleet_worker.errors import ConfigurationError
from fleet_worker.host import state_socket
from fleet_worker.mlx.offering import Offering
from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.status import InstanceStatus, ModelStatus

log = logging.getLogger(__name__)

REPORT_EVERY = 1.0  # seconds
SOON_APART = 0.25
"""Seconds between two reports because requests have ended, however many do."""
SILENT_AFTER = 3.5
"""Seconds without a report after which a node counts as frozen."""
LONGEST_LINE = 1024 * 1024  # bytes


def _none_if_invalid(value: Any, validate: ValidatorFunctionWrapHandler) -> CacheDigest | None:
    """Whether a node is ready counts, also if another version cannot use its digest."""
    try:
        digest: CacheDigest | None = validate(value)
    except ValidationError:
        return None
    return digest


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one inference node reports; `counters` is `Counters.report()`. Fields of newer versions are ignored."""

    instance: InstanceStatus
    models: tuple[ModelStatus, ...]
    reply_lag: float
    """The longest time in seconds that a frame waited for the broker since the last report."""
    counters: dict[str, Any]
    prompt_cache: Annotated[CacheDigest | None, WrapValidator(_none_if_invalid)] = None
    """None from an older node, and until the prompt cache of its server is known."""


_JSON = TypeAdapter(NodeReport)


def model_status(offering: Offering, status: str) -> ModelStatus:
    """Return the status of an offering; its limits are those that are known."""
    limits = {"context_window": offering.context_window, "dimensions": offering.settings.dimensions}
    if "embed" not in offering.capabilities:
        limits["max_output_tokens"] = offering.settings.max_output_tokens
    return ModelStatus(
        model=offering.model,
        capabilities=offering.capabilities,
        features=tuple(name for name, feature in offering.features.items() if feature.value),
        limits={name: value for name, value in limits.items() if value},
        status=status,
    )


def socket_path(state_dir: Path, host: str) -> Path:
    """Return where the registry node of this host listens.

    Raises:
        ConfigurationError: the path is too long for a Unix socket.
    """
    return state_socket.path_of(state_dir, host)


class StatusClient:
    """The node's end: one thread that sends `report()` every second, and at once after `send_now()`.

    Without a registry node, reports are dropped: each one is complete.
    """

    def __init__(self, path: Path, report: Callable[[], NodeReport]) -> None:
        self._path = path
        self._report = report
        self._wake = threading.Event()
        self._closed = False
        self._socket: socket.socket | None = None
        self._sent_at = -math.inf
        self._can_wait = False
        """The next report is not urgent."""
        self._thread = threading.Thread(target=self._run, name="fleet-status-client", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send_now(self) -> None:
        self._can_wait = False
        self._wake.set()

    def send_soon(self) -> None:
        """Send a report, `SOON_APART` seconds after the last one or later: callers may be many."""
        if not self._can_wait:
            self._can_wait = True
            self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._send()
            except OSError:
                self._disconnect()
            except Exception as error:
                log.error("the status of this node could not be reported (%s)", type(error).__name__)
            self._wake.wait(REPORT_EVERY)
            self._wake.clear()
            if self._can_wait:
                self._wake.wait(max(0.0, self._sent_at + SOON_APART - time.monotonic()))
                self._can_wait = False
        self._disconnect()

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(REPORT_EVERY)
            self._socket.connect(str(self._path))
        self._socket.sendall(_JSON.dump_json(self._report()) + b"\n")

    def _disconnect(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None


class StatusServer:
    """The registry node's end: keeps the last report of every connected node, and calls `changed` for a new node, a
    lost one, another status, reason, set of lanes or models, and when one that is not ready has ended its work; and
    `digest_changed` for another digest.

    Raises:
        ConfigurationError: another registry node of this host listens already, or the socket cannot be created.
    """

    def __init__(
        self, path: Path, changed: Callable[[], None], digest_changed: Callable[[], None] = lambda: None
    ) -> None:
        self._path = path
        self._changed = changed
        self._digest_changed = digest_changed
        self._lock = threading.Lock()
        self._reports: dict[socket.socket, NodeReport] = {}
        self._closed = False
        self._socket = state_socket.listen(path, make_free=_check_free, backlog=64)
        self._thread = threading.Thread(target=self._accept, name="fleet-status-server", daemon=True)
        self._thread.start()

    def reports(self) -> dict[str, NodeReport]:
        """Return the last report by instance. If a node has connected twice, the newer connection counts."""
        with self._lock:
            return {report.instance.name: report for report in self._reports.values()}

    def close(self) -> None:
        self._closed = True
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed; or too many open files; or a node has disconnected already, on macOS
                time.sleep(0.1)
                continue
            threading.Thread(target=self._read, args=(connection,), name="fleet-status-reader", daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        """Read until the node disconnects, falls silent, or sends anything but a report: then it counts as gone."""
        node = ""
        try:
            with connection, connection.makefile("rb") as lines:
                connection.settimeout(SILENT_AFTER)
                while line := lines.readline(LONGEST_LINE):
                    report = _JSON.validate_json(line)
                    node = report.instance.node
                    self._receive(connection, report)
        except (OSError, ValidationError) as error:
            log.warning("%s: its status is not received any more (%s)", node or "a node", type(error).__name__)
        if node:
            with self._lock:
                self._reports.pop(connection, None)
            self._changed()
            self._digest_changed()

    def _receive(self, connection: socket.socket, report: NodeReport) -> None:
        with self._lock:
            before = self._reports.get(connection)
            self._reports[connection] = report
        if before is None or _published_at_once(before) != _published_at_once(report):
            self._changed()
        if before is None or before.prompt_cache != report.prompt_cache:
            self._digest_changed()


def _published_at_once(report: NodeReport) -> tuple[Any, ...]:
    """What routers must learn without delay; the figures can wait for the next beat. An instance that is not ready
    counts as there while it works, so the end of its last request is such news."""
    instance = report.instance
    works_on = not instance.ready and instance.running > 0
    return instance.status, instance.reason, instance.lanes, report.models, works_on


def _check_free(path: Path) -> None:
    """Remove the socket of a registry node that was killed; raise `ConfigurationError` if its owner is alive."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except TimeoutError:
            text = "a registry node runs already on this host, and is frozen: end it first"
            raise ConfigurationError(text) from None
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise ConfigurationError("a registry node runs already on this host: end it first")
