"""Bytes of a `text/event-stream` -> the payloads of its events."""

from __future__ import annotations

from fleet_worker.errors import MalformedOutput

MAX_EVENT_BYTES = 8 * 1024 * 1024


class EventStream:
    """Splits a stream as it arrives; `feed` returns the events that are complete by now.

    Lines end with \\n, \\r\\n or \\r and nothing else: U+2028 and its like, at which `str.splitlines` and httpx's
    `iter_lines` cut too, are ordinary text inside of JSON. All of it happens on bytes and line ends are ASCII, so a
    character that arrives in two pieces is never decoded in halves.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._held = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that is now complete.

        Raises:
            MalformedOutput: an event grew beyond 8 MiB.
        """
        buffered = self._rest + received if self._rest else received
        end = _last_line_end(buffered)
        self._rest = buffered[end:]
        events = self._events(buffered[:end])
        if len(self._rest) + self._held > MAX_EVENT_BYTES:
            raise MalformedOutput("the MLX server sent an event that never ends")
        return events

    def _events(self, lines: bytes) -> list[bytes]:
        events = []
        for line in lines.splitlines():  # bytes.splitlines cuts at \n, \r\n and \r only
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._held += len(line)
            elif not line and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
                self._held = 0
        return events

    def end(self) -> list[bytes]:
        """Return what the last event held if the server closed without the blank line that ends it."""
        rest, self._rest = self._rest, b""
        return self._events(rest + b"\n\n")


def _last_line_end(buffered: bytes) -> int:
    """Where the last complete line ends. A final \\r waits: it may be the first half of \\r\\n."""
    end = max(buffered.rfind(b"\n"), buffered.rfind(b"\r", 0, len(buffered) - 1))
    return end + 1
