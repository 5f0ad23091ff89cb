"""Strings from Redis: what is larger than any message of ours is read, and not kept."""

import socket
import threading
import tracemalloc

import pytest

from fleet_worker.broker.bounded_socket import SMALL, BoundedBuffer, packed

MOST = 1_000_000


@pytest.fixture
def received():
    """Returns a function that sends bytes and returns the buffer that receives them."""
    here, there = socket.socketpair()
    here.settimeout(10)
    buffer = BoundedBuffer(here, 65536, 10)
    buffer.most_bytes = MOST
    threads = []

    def send(*parts):
        threads.append(threading.Thread(target=lambda: [there.sendall(part) for part in parts]))
        threads[-1].start()
        return buffer

    yield send
    for thread in threads:
        thread.join(10)
    here.close()
    there.close()


@pytest.mark.parametrize("size", [0, 1, SMALL, SMALL + 1, MOST])
def test_a_string_arrives_whole_and_so_does_the_next(received, size):
    buffer = received(b"$%d\r\n" % size, b"x" * size, b"\r\n:5\r\n")
    assert buffer.readline() == b"$%d" % size
    assert buffer.read(size) == b"x" * size
    assert buffer.readline() == b":5"


def test_a_string_that_is_too_large_is_empty_and_the_next_one_arrives(received):
    size = 20 * MOST
    part = b"x" * MOST
    buffer = received(b"$%d\r\n" % size, *[part] * 20, b"\r\n$2\r\nok\r\n")
    assert buffer.readline() == b"$%d" % size
    tracemalloc.start()
    try:
        assert buffer.read(size) == b""
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert buffer.readline() == b"$2"
    assert buffer.read(2) == b"ok"


def test_a_command_is_written_as_redis_reads_it():
    assert packed("BRPOP", "lane-ü", 4.0) == (b"*3\r\n$5\r\nBRPOP\r\n$7\r\nlane-\xc3\xbc\r\n$3\r\n4.0\r\n",)
