"""Of all processes that have the name of one node, one stays: to routers and operators they would be one node.

Each process asks all of its name for their ranks, whenever it has connected: also after an outage of the broker, in
which another may have begun. It ends if one of them has a better rank.

- A process is settled once it has answered itself and heard no question of another one meanwhile; until then it asks
  again. A settled process has a better rank than all that are not, and asks again when it hears a question.
- Of two that are both settled, or both not, the one with the lower id has the better rank.

A process hears questions before it asks its own. So the later one of two questions reaches both processes, and they
come to one result. On RabbitMQ only one of them has the control queue of that name, and hears questions: a process that
does not have it has lost if another one answers.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from celery import Celery

log = logging.getLogger(__name__)

ANSWERED_WITHIN = 0.5
"""Seconds that the processes of that name have for an answer. A process should be settled before another can begin; an
answer that comes later is asked for again."""
ASKED_AGAIN_AFTER = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between two questions until one is enough; the last one from then on."""
SPREAD = 5.0
"""Seconds within which the nodes of a fleet ask after an outage of the broker: each question reaches all of them."""


class NameClaim:
    """The claim of this process to a node's name. `lost` is called, once, if another process has a better one."""

    def __init__(self, app: Celery, name: str, lost: Callable[[], object]) -> None:
        self._app = app
        self._name = name
        self._lost = lost
        self._id = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._is_settled = self._has_lost = self._is_connected = self._is_asking = False
        self._hears_questions = True
        self._heard = 0
        """Questions so far, its own included; and connections, each of which may hide some."""

    def process(self, state: Any) -> list[Any]:
        """A control command: return the id of this process, and whether it is settled."""
        with self._lock:
            self._heard += 1
            answer = [self._id, self._is_settled]
        self._begin_to_ask()  # the asker may not hear this answer: it may have asked while this process was frozen
        return answer

    def connected(self, connected: bool, hears_questions: bool) -> None:
        """To be called when this process is connected, and when it is not any more; and when it hears questions."""
        with self._lock:
            self._is_connected, self._hears_questions = connected, hears_questions
            self._heard += connected
        if connected:
            pause = random.uniform(0.0, SPREAD) if self._is_settled else 0.0  # noqa: S311 - spreads load
            self._begin_to_ask(pause)

    def _begin_to_ask(self, pause: float = 0.0) -> None:
        with self._lock:
            if self._is_asking or self._has_lost:
                return
            self._is_asking = True
        threading.Thread(target=self._ask_until_settled, args=(pause,), name="fleet-name", daemon=True).start()

    def _ask_until_settled(self, pause: float) -> None:
        time.sleep(pause)
        questions = 0
        while not self._is_decided():
            time.sleep(ASKED_AGAIN_AFTER[min(questions, len(ASKED_AGAIN_AFTER) - 1)])
            questions += 1

    def _is_decided(self) -> bool:
        """Ask once; return whether that was enough, for now."""
        before = self._heard
        ranks = dict(self._ranks()) if self._is_connected else {}
        with self._lock:
            ours = (not self._is_settled, self._id)
            is_outranked = any((not settled, its_id) < ours for its_id, settled in ranks.items())
            self._has_lost = is_outranked or (bool(ranks) and not self._hears_questions)
            is_alone = self._id in ranks and self._heard == before + 1
            self._is_settled = self._is_settled or (is_alone and not self._has_lost)
            is_decided = self._has_lost or is_alone or not self._is_connected  # the next connection begins anew
            self._is_asking = not is_decided
        if self._has_lost:
            log.critical("another node is named %s: give the instance, or the host, a name of its own", self._name)
            self._lost()
        return is_decided

    def _ranks(self) -> Iterator[tuple[str, bool]]:
        """Yield the id of each process that answers, and whether it is settled."""
        options = {"destination": [self._name], "reply": True, "timeout": ANSWERED_WITHIN}
        try:
            answers = self._app.control.broadcast("process", **options) or ()
        except Exception as error:
            log.warning("whether there is another %s could not be asked (%s)", self._name, type(error).__name__)
            return
        for answer in answers:
            reply = answer.get(self._name) if isinstance(answer, dict) else None
            match reply:
                case [str() as its_id, settled]:
                    yield its_id, bool(settled)
