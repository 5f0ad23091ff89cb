"""Connections to Redis that hold no string in memory that is larger than any message of ours.

Anybody may send one of 512 MB to a channel or a list, and redis-py reads it three times into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from redis._parsers import _RESP2Parser, _RESP3Parser
from redis._parsers.socket import SocketBuffer
from redis.connection import Connection

SMALL = 256 * 1024
"""Bytes up to which redis-py reads a string by itself."""
_NOTHING = (b"*-1", b"$-1", b"_")
"""How Redis says that there is no list, in both of its protocols."""


@lru_cache(64)
def packed(*words: str | float) -> tuple[bytes]:
    """Return a command as `send_packed_command` takes it. For one that is sent again and again: redis-py takes longer
    to write it than to send it."""
    encoded = [str(word).encode() for word in words]
    return (b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in encoded),)


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
    _read_response: Any
    parse_error: Any

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)  # type: ignore[misc]
        self._buffer = BoundedBuffer(self._sock, connection._socket_read_size, connection.socket_timeout)
        self._buffer.most_bytes = connection.most_bytes

    def elements(self, of_key: bool) -> Iterator[bytes]:
        header = self._buffer.readline()
        if header.startswith(b"-"):
            raise self.parse_error(header[1:].decode("utf-8", "replace"))
        if header in _NOTHING:
            return
        if of_key:
            self._read_response(disable_decoding=True)  # the key
            header = self._buffer.readline()
        for _ in range(int(header[1:])):
            yield self._read_response(disable_decoding=True)
        self._buffer.purge()


class _Parser2(_BoundedParser, _RESP2Parser):
    pass


class _Parser3(_BoundedParser, _RESP3Parser):
    pass


class Bounded:
    """A base class for connections of redis-py."""

    protocol: int
    _parser: Any

    def __init__(self, *, most_bytes: int, **options: Any) -> None:
        self.most_bytes = most_bytes
        super().__init__(**options)

    def set_parser(self, parser_class: Any) -> None:
        """Use a parser that is written in Python: the one of hiredis has no bound."""
        super().set_parser(_Parser3 if self.protocol == 3 else _Parser2)  # type: ignore[misc]

    def elements(self, of_key: bool = False) -> Iterator[bytes]:
        """Yield the elements of the answer to a command that pops several, one after the other as they are read: no two
        need be in memory. `of_key`: the answer names a key before them, as that of BLMPOP.

        The connection has to be closed if this is not read to its end, unless it raises `ResponseError`.
        """
        return self._parser.elements(of_key)  # type: ignore[no-any-return]


class BoundedConnection(Bounded, Connection):
    pass
