"""What a managed server prints: the log of `up` has it by the name of the instance, within bounds."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

LONGEST_LINE = 4096
"""Bytes of a line; the rest of a longer one is left out."""
READ_AT_ONCE = 65_536
BURST = 256 * 1024
"""Bytes that a server may print at once."""
RATE = 16 * 1024
"""Bytes a second that it may print all the time: no flood fills the disk with the log of `up`."""
TOLD_EVERY = 10.0
"""Seconds between two lines about what was left out."""
PAUSE_IN_FLOOD = 0.0005
"""Seconds between two reads: a server that prints 100 MB a second prints slower, instead of taking a processor here."""
LAST_LINES = 20
KEPT_BYTES = 16 * 1024
"""Bytes of the last lines."""
OF_THE_NODE = re.compile(r'"(?:GET|HEAD) /(?:health|v1/models|v1/status)[ ?/].{0,40} 200\b')
"""What the access log of a server says about the health checks of its node: twice a second the same."""


class LineSplitter:
    """Cuts bytes into lines. Of a line without an end it keeps the beginning only."""

    def __init__(self) -> None:
        self._begun = b""

    def split(self, data: bytes) -> list[bytes]:
        *whole, rest = data.split(b"\n")
        if whole:
            whole[0] = self._begun + whole[0]
            self._begun = b""
        # A progress bar begins its line again and again by \r.
        self._begun = (self._begun + rest[-2 * LONGEST_LINE :]).rpartition(b"\r")[2][:LONGEST_LINE]
        return whole

    def take_rest(self) -> list[bytes]:
        """Return the line that has no end, and forget it."""
        begun, self._begun = self._begun, b""
        return [begun]


def as_text(line: bytes) -> str:
    """Return what a terminal would show of a line: without colours, and without what moves its cursor."""
    shown = line.rstrip(b"\r").rpartition(b"\r")[2][:LONGEST_LINE].decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    return "".join(each if each.isprintable() or each == "\t" else "\ufffd" for each in plain).rstrip()


class Allowance:
    """Decides how much is logged: `RATE` bytes a second, and `BURST` at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(BURST)
        self._exhausted = False
        self._at = self._told_at = clock()
        self._left_out = 0

    @property
    def exhausted(self) -> bool:
        """True until there is enough for the longest line."""
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._at) * RATE)
        self._at = now
        if self._exhausted and self._left >= LONGEST_LINE:
            self._exhausted = False
        return self._exhausted

    def spend(self, line: str) -> None:
        self._left -= len(line) + 50  # and what stands before it
        self._exhausted = self._left < 0

    def leave_out(self, lines: int) -> None:
        self._left_out += lines

    def take_left_out(self, *, at_once: bool = False) -> int:
        """Return how many lines were left out and are to be told now."""
        if not self._left_out or (self._clock() < self._told_at + TOLD_EVERY and not at_once):
            return 0
        count, self._left_out, self._told_at = self._left_out, 0, self._clock()
        return count


class ServerOutput:
    """A named pipe that servers of one instance print into, one after the other, and the thread that reads it.

    It has a name so that the next `up` can go on reading when this one was killed. A server opens it for reading too,
    so that it never gets SIGPIPE.
    """

    def __init__(self, instance: str, path: Path) -> None:
        self._instance = instance
        self._path = path
        self._secrets: tuple[str, ...] = ()
        self._splitter = LineSplitter()
        self._allowance = Allowance()
        self._tail = b""
        self._reading = threading.Lock()
        self._reader, self.writer = _open(path)
        os.set_blocking(self._reader, False)
        self._woken, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name=f"output of {instance}", daemon=True)
        self._thread.start()

    def begin(self, secrets: tuple[str, ...]) -> None:
        """Forget the last lines, since another server begins to print; hide these texts from now on."""
        with self._reading:
            self._tail, self._secrets = b"", secrets

    def last_lines(self) -> list[str]:
        """Read what is there, and return the last lines since `begin`."""
        with self._reading:
            for _ in range(8):  # more than the pipe holds, if nobody prints any more
                if not self._read():
                    break
            self._log(self._splitter.take_rest())
            self._tell_left_out(at_once=True)
            lines = [self._shown(line) for line in self._tail.split(b"\n")[-2 * LAST_LINES :]]
        return [line for line in lines if line][-LAST_LINES:]

    def close(self) -> None:
        os.close(self._wake)
        self._thread.join(5)
        os.close(self._woken)
        if self.writer != self._reader:
            os.close(self.writer)
        os.close(self._reader)
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fd for key, _ in selector.select(TOLD_EVERY)]
                if self._woken in ready:
                    return
                with self._reading:
                    self._read()
                    self._tell_left_out()
                    is_flood = self._allowance.exhausted
                if is_flood:
                    time.sleep(PAUSE_IN_FLOOD)

    def _read(self) -> bool:
        try:
            data = os.read(self._reader, READ_AT_ONCE)
        except BlockingIOError:
            return False
        self._tail = (self._tail + data)[-KEPT_BYTES:]
        self._log(self._splitter.split(data))
        return bool(data)

    def _log(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines):
            if self._allowance.exhausted:
                self._allowance.leave_out(len(lines) - number)
                return
            shown = self._shown(line)
            if shown and not OF_THE_NODE.search(shown):
                self._allowance.spend(shown)
                log.info("[%s] %s", self._instance, shown)

    def _shown(self, line: bytes) -> str:
        text = as_text(line)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _tell_left_out(self, *, at_once: bool = False) -> None:
        if count := self._allowance.take_left_out(at_once=at_once):
            log.warning("[%s] (%d lines left out)", self._instance, count)


def _open(path: Path) -> tuple[int, int]:
    """Return both ends of the named pipe; of one without a name if there can be none."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISFIFO(path.lstat().st_mode):
                path.unlink()
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # Not O_RDONLY: it would be at its end whenever no server runs.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK), os.open(path, os.O_RDWR)
    except OSError:
        return os.pipe()
