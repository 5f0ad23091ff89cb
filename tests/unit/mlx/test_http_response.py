"""A response, in all the pieces in which it may arrive; h11 is the judge of what one is."""

import random
import socket
from contextlib import contextmanager

import h11
import httpx
import pytest

from fleet_worker.mlx.http_response import ResponseReader

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CONTENT = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"
ENDLESS = b"x" * 1024 * 1024


class Pieces:
    """A connection on which each read brings one piece."""

    def __init__(self, pieces):
        self._pieces = iter(pieces)

    def recv(self, size):
        return next((piece for piece in self._pieces if piece), b"")

    def close(self):
        pass


def read(pieces):
    """Return the response, and the pieces of its body."""
    response = ResponseReader(Pieces(pieces)).read_headers()
    return response, list(response.stream)


def body_of(pieces):
    """Return the content, and whether it is whole."""
    reader, content = ResponseReader(Pieces(pieces)), b""
    try:
        for piece in reader.read_headers().stream:
            content += piece
    except httpx.RemoteProtocolError:
        return content, False
    return content, True


def body_by_h11(body):
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "mini")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(HEAD + body)
    content, ended = b"", False
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            content += event.data
        elif isinstance(event, h11.EndOfMessage):
            ended = True
        elif not isinstance(event, h11.Response):
            return content, ended


def drawn(draw):
    chunks = [draw.randbytes(draw.choice((1, 2, 15, 16, 200, 5000))) for _ in range(draw.randrange(5))]
    extension = draw.choice((b"", b";a=b", b" "))
    sized = [draw.choice((b"%x", b"%X", b"0%x")) % len(chunk) + extension + b"\r\n" + chunk for chunk in chunks]
    trailer = draw.choice((b"", b"", b"a: b\r\nc: d\r\n"))
    whole = b"".join(each + b"\r\n" for each in sized) + b"0\r\n" + trailer + b"\r\n"
    return whole[: draw.choice((len(whole), draw.randrange(len(whole) + 1)))]


def cut(body, draw):
    places = sorted(draw.randrange(len(body) + 1) for _ in range(draw.randrange(6)))
    return [body[start:end] for start, end in zip([0, *places], [*places, len(body)], strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_a_body_in_any_pieces_whole_or_broken_off_is_what_h11_makes_of_it(seed):
    draw = random.Random(seed)
    for _ in range(100):
        body = drawn(draw)
        assert body_of(cut(HEAD + body, draw)) == body_by_h11(body)


def test_each_byte_may_come_alone_and_what_follows_the_end_is_ignored():
    body = b"3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n"
    assert body_of(bytes([byte]) for byte in HEAD + body) == (b"abc0123456789abcdef", True)
    assert body_of([HEAD + body]) == (b"abc0123456789abcdef", True)
    assert body_of([CONTENT + b"abcdef"]) == (b"abcd", True)


def test_what_has_arrived_together_is_returned_together():
    _, pieces = read([HEAD + b"1\r\na\r\n1\r\nb\r\n2\r\nc", b"d\r\n3\r\nefg\r\n0\r\n\r\n"])
    assert pieces == [b"abc", b"defg"]


def test_status_version_and_headers_are_those_of_the_response_not_of_what_comes_before_or_after_it():
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    chunked = b"HTTP/1.0 418\r\nA: b\r\ntransfer-encoding: chunked\r\n\r\n0\r\nc: d\r\n\r\n"
    for pieces in ([early + chunked], [early, chunked]):
        response, body = read(pieces)
        assert (response.status_code, response.http_version, body) == (418, "HTTP/1.0", [])
        assert response.headers.multi_items() == [("a", "b"), ("transfer-encoding", "chunked")]


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.0 200 OK\r\n\r\nabcd",
        b"HTTP/1.1 200\r\ncontent-type: text/plain\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\nServer: x\n\nabcd",
        CONTENT + b"abcd",
        HEAD.replace(b"\r\n\r\n", b"\r\ncontent-length: 9\r\n\r\n") + b"4\r\nabcd\r\n0\r\n\r\n",
    ],
    ids=["to the end", "no reason", "no carriage return", "of a length", "chunked and of a length"],
)
def test_a_body_ends_as_its_headers_tell(response):
    assert body_of([response]) == (b"abcd", True)


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-",
        CONTENT + b"abc",
        HEAD + b"4\r\nabcd\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\na: " + ENDLESS,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
        HEAD + b"x\r\n",
        HEAD + b"-1\r\n",
        HEAD + b"1\r\nab\r\n",
        HEAD + b"11111111111111111111111\r\n",
        HEAD + b"1;" + ENDLESS,
        HEAD + b"0\r\n" + b"a: b\r\n" * 200_000,
    ],
    ids=[
        "nothing", "half of the headers", "shorter", "no last chunk", "not HTTP", "no status", "another protocol",
        "endless header", "never a status", "no number", "negative", "longer", "too large", "endless line",
        "endless trailers",
    ],
)  # fmt: skip
def test_what_is_no_whole_response_is_refused(response):
    with pytest.raises(httpx.RemoteProtocolError):
        read(response[at : at + 4000] for at in range(0, len(response), 4000))


@contextmanager
def connections():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_connection_that_breaks_is_an_error():
    with connections() as (ours, _):
        reader = ResponseReader(ours)
        ours.settimeout(0.01)
        with pytest.raises(httpx.ReadError):
            reader.read_headers()
