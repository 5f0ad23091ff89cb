"""Connections to Redis that hold no string in memory that is larger than any message of ours.

Anybody may send one of 512 MB to a channel or a list, and redis-py reads it three times into memory.
"""

from __future__ import annotations

from typing import Any

from redis._parsers import _RESP2Parser, _RESP3Parser
from redis._parsers.socket import SocketBuffer
from redis.connection import Connection

SMALL = 256 * 1024
"""Bytes up to which redis-py reads a string by itself."""


class BoundedBuffer(SocketBuffer):
    """Reads a string of more than `most_bytes` to its end, and returns an empty one."""

    most_bytes = 0

    def read(self, length: int, *args: Any, **options: Any) -> Any:
        if length <= SMALL:
            return super().read(length, *args, **options)
        string, left = bytearray(), length + len(b"\r\n")
        while left:
            part = self._buffer.read(left)
            left -= len(part)
            if length <= self.most_bytes:
                string += part
            if left:  # all is read that had arrived
                self._buffer.seek(0)
                self._buffer.truncate()
                self._read_from_socket(*args, **options)
        del string[length:]
        return string


class _BoundedParser:
    _buffer: Any
    _sock: Any

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)  # type: ignore[misc]
        self._buffer = BoundedBuffer(self._sock, connection._socket_read_size, connection.socket_timeout)
        self._buffer.most_bytes = connection.most_bytes


class _Parser2(_BoundedParser, _RESP2Parser):
    pass


class _Parser3(_BoundedParser, _RESP3Parser):
    pass


class Bounded:
    """A base class for connections of redis-py."""

    protocol: int

    def __init__(self, *, most_bytes: int, **options: Any) -> None:
        self.most_bytes = most_bytes
        super().__init__(**options)

    def set_parser(self, parser_class: Any) -> None:
        """Use a parser that is written in Python: the one of hiredis has no bound."""
        super().set_parser(_Parser3 if self.protocol == 3 else _Parser2)  # type: ignore[misc]


class BoundedConnection(Bounded, Connection):
    pass
