"""The body of a chat stream as it arrives: bytes -> the data of each server-sent event, in all their variants."""

from __future__ import annotations

from pydantic_core import to_json

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.body import check_containers

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Of one event, or of an answer that is no stream: a million tokens in one piece."""
_BLANK = b"\xef\xbb\xbf \t\r\n"
"""The bytes of a byte order mark, and white space."""
_WHOLE = (b"{", b"[", b'"', b"<")
"""With one of these begins an answer in one piece: JSON or a web page, but no line of an event stream."""
HEARTBEATS = (b"ping", b"heartbeat", b"keepalive", b"keep-alive")
"""As the type of an event, or as its data."""


class EventParser:
    """Splits a `text/event-stream` into its events.

    Lines end with \\n, \\r\\n or \\r and nothing else: U+2028 and similar, at which `str.splitlines` and httpx's
    `iter_lines` split too, are ordinary text inside JSON. The parser works on bytes, and line ends are ASCII, so half a
    character is never decoded.

    Events without data are heartbeats and left out. What a server sends as `event: error` becomes `{"error": ...}`. A
    body that is no event stream, whatever its content-type says, is one event at its end (`is_whole`).
    """

    def __init__(self) -> None:
        self.is_whole = False
        self._begun = False
        self._incomplete: bytes | bytearray = b""
        self._data: list[bytes] = []
        self._data_size = 0
        self._type = b""

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that is now complete.

        Raises:
            MalformedOutput: an event is larger than 4 MiB, or would be in memory.
        """
        if not self._begun:
            self._begin(received)
        if self.is_whole:
            return self._collect(received)
        if self._incomplete:
            # A final \r may be the first half of \r\n: it waits for the next bytes.
            if not (b"\n" in received or b"\r" in received or self._incomplete.endswith(b"\r")):
                return self._collect(received)
            received = bytes(self._incomplete + received)
            self._incomplete = b""
            check_containers(received)
        end = 1 + max(received.rfind(b"\n"), received.rfind(b"\r", 0, len(received) - 1))
        events = self._events(received[:end])
        if end < len(received):
            self._incomplete = received[end:]
        if self._incomplete or self._data:
            self._check_size()
        return events

    def end(self) -> list[bytes]:
        """Return the last event, if the server closed without the blank line that ends it."""
        rest, self._incomplete = bytes(self._incomplete), b""
        check_containers(rest)
        return [rest.lstrip(_BLANK)] if self.is_whole else self._events(rest + b"\n\n")

    def _collect(self, received: bytes) -> list[bytes]:
        """Take a part of a line, or of a whole body. Adding it to `bytes` would copy all that came before."""
        if isinstance(self._incomplete, bytes):
            self._incomplete = bytearray(self._incomplete)
        self._incomplete += received
        self._check_size()
        return []

    def _begin(self, received: bytes) -> None:
        """Find out by its first byte whether this is an event stream."""
        start = received.lstrip(_BLANK)
        self._begun = bool(start)
        self.is_whole = start.startswith(_WHOLE)

    def _check_size(self) -> None:
        if len(self._incomplete) + self._data_size > MAX_EVENT_BYTES:
            raise MalformedOutput("the MLX server sent an event that is too large")

    def _events(self, lines: bytes) -> list[bytes]:
        events = []
        for line in lines.splitlines():  # bytes.splitlines splits at \n, \r\n and \r only
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
                self._data_size += len(line)
            elif line:
                self._read_field(line)
            elif self._data or self._type:
                data = self._data[0] if len(self._data) == 1 else self._joined()
                if self._type:
                    data = self._typed(data)
                if data:
                    events.append(data)
                self._data = []
                self._data_size = 0
        return events

    def _joined(self) -> bytes:
        data = b"\n".join(self._data)
        check_containers(data)
        return data

    def _read_field(self, line: bytes) -> None:
        """Read a line that does not begin with `data:`: a comment, another field, or one after a byte order mark."""
        name, _, value = line.lstrip(_BLANK).partition(b":")
        if name == b"event":
            self._type = value.strip().lower()[:32]
        elif name == b"data" and name != line:
            self._data.append(value.removeprefix(b" "))
            self._data_size += len(line)

    def _typed(self, data: bytes) -> bytes:
        """Return what the data of an event with a type means."""
        kind, self._type = self._type, b""
        if b"error" in kind:
            return to_json({"error": data.decode("utf-8", "replace")})
        return b"" if kind in HEARTBEATS else data
