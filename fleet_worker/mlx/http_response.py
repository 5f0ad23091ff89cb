"""The bytes of an HTTP/1.1 response as they arrive from a socket -> status, headers and body."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httptools
import httpx

_RECEIVE_BYTES = 64 * 1024
_MOST_OVERHEAD_BYTES = 100 * 1024
"""Bytes received in a row that are not the body: headers, marks of chunks, trailers."""


class ResponseReader(httpx.SyncByteStream):
    """Reads one response, after which the connection is closed. As an iterable it is the body: each piece is all that
    has arrived since the last one, without the marks of chunks."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        # Not dangerous here: nothing follows the response, and no other program reads it in another way.
        self._parser.set_dangerous_leniencies(
            lenient_chunked_length=True,
            lenient_data_after_close=True,
            lenient_optional_cr_before_lf=True,
            lenient_optional_lf_after_cr=True,
            lenient_spaces_after_chunk_size=True,
        )
        self._headers: list[tuple[bytes, bytes]] = []
        self._has_headers = self._is_complete = False
        self._body: list[bytes] = []
        self._overhead = 0

    def read_headers(self) -> httpx.Response:
        """Return the response once its headers have arrived.

        Raises:
            httpx.HTTPError: the connection broke, or the answer is not HTTP.
        """
        while not self._has_headers:
            self._receive()
        version = f"HTTP/{self._parser.get_http_version()}".encode()
        extensions = {"http_version": version}
        return httpx.Response(self._parser.get_status_code(), headers=self._headers, stream=self, extensions=extensions)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            if self._body:
                received, self._body = self._body, []
                yield received[0] if len(received) == 1 else b"".join(received)
            elif self._is_complete:
                return
            else:
                self._receive()

    def close(self) -> None:
        self._connection.close()

    def _receive(self) -> None:
        try:
            received = self._connection.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise httpx.ReadError(str(error)) from error
        if received:
            self._parse(received)
        elif self._has_headers and self._ends_with_the_connection:
            self._is_complete = True
        else:
            raise httpx.RemoteProtocolError("the server closed the connection before its response was complete")

    def _parse(self, received: bytes) -> None:
        try:
            self._parser.feed_data(received)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not (self._is_complete or self._body):  # what came before is used; the next bytes raise this again
                raise httpx.RemoteProtocolError(type(error).__name__) from None
        self._overhead = 0 if self._body else self._overhead + len(received)
        if self._overhead > _MOST_OVERHEAD_BYTES:
            raise httpx.RemoteProtocolError("the server sends headers without end")

    @property
    def _ends_with_the_connection(self) -> bool:
        """Whether the end of the connection is the end of the body: nothing else tells its length."""
        return not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self._headers)

    # Called by the parser

    def on_message_begin(self) -> None:
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_headers:  # else it is a trailer
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._has_headers = self._parser.get_status_code() >= 200  # else the response follows it

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._is_complete = self._has_headers
