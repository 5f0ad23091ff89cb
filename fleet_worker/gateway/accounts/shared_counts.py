"""What keys have used, counted in the fleet's Redis or Valkey for all gateways together, by `count_scripts`.

The count of a budget is the sum of what each gateway says that it has used itself. It says all of it, each time: a
message that is lost or sent twice, or a broker that has forgotten everything, is made up for by the next one.

One task talks to the broker: what gathers while it waits for answers is sent together. It opens the connection again
when it is lost; until then `take` returns None at once, and nothing else is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Connection

from fleet_worker.broker.connection import BACK_OFF
from fleet_worker.broker.faults import BROKER_ERRORS, describe
from fleet_worker.broker.topology import quota_keys
from fleet_worker.gateway.accounts.count_scripts import RENEW, SETTLE, TAKE
from fleet_worker.gateway.accounts.counts import BUDGETS, Limit, Taken, Wanted, Window

log = logging.getLogger(__name__)

ANSWER_WITHIN = 0.2
"""Seconds that a request waits for the broker. Then its gateway decides alone."""
LOST_AFTER = 0.2
"""Seconds after which the connection to a broker that does not answer counts as lost."""
OPEN_WITHIN = 2.0
"""Seconds in which a connection has to be open. No request waits for that."""
LEASE = 30
"""Seconds after which a request counts as lost if its gateway has not renewed its lease."""
MOST_AT_ONCE = 100
"""Commands that are sent together."""
PING_EVERY = 10.0
"""Seconds without a command after which the broker is asked whether it is there."""
PROBE = ""
"""In place of a key's name: what is written to see whether the broker takes it. No key has it."""

_SCRIPTS = (TAKE, SETTLE, RENEW)
_SHA = {script: hashlib.sha1(script.encode()).hexdigest() for script in _SCRIPTS}  # noqa: S324 - EVALSHA's name of it


@dataclass(frozen=True, slots=True)
class Own:
    """What this gateway itself has used of a budget, in the window with this number."""

    number: int
    used: int


Change = tuple[Limit, int, int]
"""A limit, what is added to it (less than 0: given back), and the number of the window of which that was taken."""


@dataclass(slots=True)
class _Command:
    words: tuple[Any, ...]
    answer: asyncio.Future[Any] | None = None


class SharedCounts:
    """The counts of all gateways. For one event loop; `open` it first, `close` it last.

    `gateway` names this one, the same after a restart. `connect` returns a connection that is not open; `opened` is
    called each time it is, before any request uses it.
    """

    def __init__(self, gateway: str, connect: Callable[[], Connection], opened: Callable[[], object]) -> None:
        self._gateway = gateway
        self._connect = connect
        self._opened = opened
        self._commands: deque[_Command] = deque()
        self._has_commands = asyncio.Event()
        self._asked: list[_Command] = []
        """What was sent and is not all answered yet."""
        self._is_alone = False
        """Whether that was logged."""
        self._task: asyncio.Task[None] | None = None
        self.are_there = False
        """Whether the broker answers."""

    def open(self) -> None:
        self._task = asyncio.create_task(self._run(), name="fleet-quotas")

    async def close(self) -> None:
        """Send what waits, if the broker takes it, and close the connection."""
        if self.are_there:
            answer = asyncio.get_running_loop().create_future()
            self._commands.append(_Command(("PING",), answer))
            self._has_commands.set()
            await asyncio.wait([answer], timeout=ANSWER_WITHIN)
        while self._task and not self._task.done():
            self._task.cancel()  # again: asyncio.wait_for of Python 3.11 may lose it
            await asyncio.wait([self._task], timeout=0.1)

    async def take(
        self, key: str, wanted: Wanted, own: Callable[[Limit], Own], late: Callable[[Taken], object]
    ) -> Taken | None:
        """Count a request if it fits. Return None if the broker does not answer in time. If it answers later, `late` is
        called with the answer."""
        if not self.are_there:
            return None
        words = [self._gateway, wanted.lease, LEASE, wanted.max_parallel or 0]
        for limit in wanted.limits:
            words += [limit.name, limit.most, limit.charge, *_own(limit, own)]
        answer = asyncio.get_running_loop().create_future()
        self._send(TAKE, key, words, answer)
        try:
            await asyncio.wait([answer], timeout=ANSWER_WITHIN)
        finally:
            if not answer.done():
                answer.add_done_callback(lambda answer: answer.cancelled() or late(_taken(answer.result(), wanted)))
        return _taken(answer.result(), wanted) if answer.done() and not answer.cancelled() else None

    def settle(self, key: str, lease: str, changes: Iterable[Change], own: Callable[[Limit], Own]) -> None:
        """Change what is counted of a request; with its lease, it has ended."""
        words: list[Any] = [self._gateway, lease]
        for limit, charge, number in changes:
            of_budget = _own(limit, own)
            words += [limit.name, charge, of_budget[0] or number, of_budget[1]]
        self._send(SETTLE, key, words)

    def renew(self, key: str, leases: Iterable[str]) -> None:
        self._send(RENEW, key, [LEASE, *leases])

    def _send(self, script: str, key: str, words: list[Any], answer: asyncio.Future[Any] | None = None) -> None:
        if self.are_there:
            self._commands.append(_Command(("EVALSHA", _SHA[script], 2, *quota_keys(key), *words), answer))
            self._has_commands.set()

    async def _run(self) -> None:
        failures = 0
        while True:
            connection = self._connect()
            try:
                async with asyncio.timeout(OPEN_WITHIN):
                    await self._open(connection)
                failures = 0
                await self._exchange(connection)
            except BROKER_ERRORS as error:
                failures += 1
                self._note_lost(error)
            finally:
                self._forget()
                with contextlib.suppress(*BROKER_ERRORS):
                    await connection.disconnect(nowait=True)
            await asyncio.sleep(BACK_OFF[min(failures, len(BACK_OFF) - 1)])

    async def _open(self, connection: Connection) -> None:
        """Load the scripts, and try one that writes: a broker without memory refuses that only."""
        await connection.connect()  # type: ignore[no-untyped-call]
        probe = ("EVALSHA", _SHA[RENEW], 2, *quota_keys(PROBE), LEASE, self._gateway)
        commands = [*(("SCRIPT", "LOAD", script) for script in _SCRIPTS), probe]
        await _ask(connection, [_Command(words) for words in commands])
        if self._is_alone:
            log.info("the quotas of keys hold for all gateways together again")
        self.are_there, self._is_alone = True, False
        self._opened()

    async def _exchange(self, connection: Connection) -> None:
        """Send what there is to send, until an error."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_EVERY):
                    await self._has_commands.wait()
            self._has_commands.clear()
            if not self._commands:
                self._commands.append(_Command(("PING",)))
            while self._commands:
                size = min(MOST_AT_ONCE, len(self._commands))
                self._asked = [self._commands.popleft() for _ in range(size)]
                async with asyncio.timeout(LOST_AFTER):
                    await _ask(connection, self._asked)

    def _note_lost(self, error: BaseException) -> None:
        if not self._is_alone:
            self._is_alone = True
            log.warning("the quotas of keys hold for this gateway alone: the broker %s", describe(error))

    def _forget(self) -> None:
        """End all that waits for an answer."""
        self.are_there = False
        for command in (*self._asked, *self._commands):
            if command.answer:
                command.answer.cancel()
        self._asked = []
        self._commands.clear()


async def _ask(connection: Connection, commands: list[_Command]) -> None:
    """Send these commands together, and read their answers."""
    await connection.send_packed_command(
        connection.pack_commands([each.words for each in commands]), check_health=False
    )
    for command in commands:
        answer = await connection.read_response()
        if command.answer and not command.answer.done():
            command.answer.set_result(answer)


def _own(limit: Limit, own: Callable[[Limit], Own]) -> tuple[int, int]:
    """Return number and use of a budget; two zeros for what is no budget."""
    if limit.name not in BUDGETS:
        return 0, 0
    of_gateway = own(limit)
    return of_gateway.number, of_gateway.used


def _taken(answer: list[Any], wanted: Wanted) -> Taken:
    now, refused, running, *counts = answer
    windows = {limit.name: Window(*counts[3 * at : 3 * at + 3]) for at, limit in enumerate(wanted.limits)}
    return Taken(float(now), refused.decode(), running, windows)
