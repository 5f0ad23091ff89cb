"""Of all processes that have the name of one node, one stays: to routers and operators they would be one node.

Each process asks all of its name, whenever it has connected: also after an outage of the broker, in which another may
have begun. The question and each answer carry a rank, and whoever hears of a better one ends. A process that has once
got the answer to its own question, and heard of no better rank until then, is settled: it has a better rank than all
that are not. Between two that are equally far, the lower id has the better one. Since a process can be heard before it
asks, at least one of two hears of the other, and both come to the same result.

On RabbitMQ only one of them has the control queue of that name: it hears the questions of the others, and answers.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

from celery import Celery

log = logging.getLogger(__name__)

ANSWERED_WITHIN = 2.0
"""Seconds that the processes of that name have for an answer."""
ASKED_AGAIN_AFTER = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before each further question of a process that has not got its own answer; the last one from then on."""

Rank = tuple[bool, str]
"""The lower is the better one."""


class NameClaim:
    """The claim of this process to a node's name. `lost` is called, once, if another process has it."""

    def __init__(self, app: Celery, name: str, lost: Callable[[], object]) -> None:
        self._app = app
        self._name = name
        self._lost = lost
        self._id = uuid.uuid4().hex
        self._lock = threading.RLock()
        self._is_settled = self._has_lost = False
        self._connections = 0
        self._is_connected = threading.Event()
        self._asking = threading.Lock()
        """One thread asks at a time."""
        self._ended = threading.Event()

    def process(self, state: Any, asker: str = "", settled: bool = False, **_: Any) -> list[Any]:
        """A control command: return the id of this process and whether it is settled. Older versions send no asker, and
        answer with their age."""
        with self._lock:  # the answer is what the comparison is made with
            if asker and asker != self._id:
                self._compare(str(asker), bool(settled))
                if self._is_settled:  # the asker may not hear this: it may have asked while this process was frozen
                    self._ask_in_thread()
            return [self._id, self._is_settled]

    def connected(self, connected: bool) -> None:
        """To be called when this process hears questions, and when it does not any more."""
        if connected:
            self._is_connected.set()
            self._connections += 1
            self._ask_in_thread()
        else:
            self._is_connected.clear()

    def close(self) -> None:
        """Ask no more."""
        self._ended.set()

    def _ask_in_thread(self) -> None:
        threading.Thread(target=self._ask_until_heard, name="fleet-name", daemon=True).start()

    def _ask_until_heard(self) -> None:
        """Ask until this process has heard its own question."""
        connection = self._connections
        if not self._asking.acquire(blocking=False):
            return  # if that is about an older connection, it is asked again below
        try:
            for failures in range(1_000_000):
                pause = ASKED_AGAIN_AFTER[min(failures, len(ASKED_AGAIN_AFTER) - 1)]
                if self._ended.wait(pause) or self._has_lost or not self._is_connected.is_set():
                    return
                if self._ask() and connection == self._connections:
                    return
                connection = self._connections
        finally:
            self._asking.release()

    def _ask(self) -> bool:
        """Ask once; return whether this process heard it, too."""
        question = {"asker": self._id, "settled": self._is_settled}
        try:
            answers = self._app.control.broadcast(
                "process", arguments=question, destination=[self._name], reply=True, timeout=ANSWERED_WITHIN
            )
            others = dict(answer[self._name] for answer in answers or ())
        except Exception as error:
            log.warning("whether there is another %s could not be asked (%s)", self._name, type(error).__name__)
            return False
        with self._lock:
            is_heard = others.pop(self._id, None) is not None
            for its_id, settled in others.items():
                self._compare(str(its_id), bool(settled))
            self._is_settled = self._is_settled or (is_heard and not self._has_lost)
        return is_heard

    def _compare(self, its_id: str, its_settled: bool) -> None:
        """Give the name up if the other process has a better rank."""
        ours: Rank = (not self._is_settled, self._id)
        if not self._has_lost and (not its_settled, its_id) < ours:
            self._has_lost = True
            log.critical("another node is named %s: give the instance, or the host, a name of its own", self._name)
            self._lost()
