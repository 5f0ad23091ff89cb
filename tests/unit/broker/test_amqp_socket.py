"""Sockets to RabbitMQ in an event loop, where a read must not wait."""

import select
import socket
import ssl
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from amqp.exceptions import ConnectionForced

from fleet_worker.broker.amqp_socket import Connection, SecureSocket, Socket
from tests.mlx_clients import took_less_than
from tests.tls import Certificates

FRAME = struct.pack(">BHI", 1, 7, 20) + b"x" * 20 + b"\xce"


@pytest.fixture(params=["plain", "tls"])
def pair(request, tmp_path):
    """Our socket, and the end that a broker has."""
    made = Certificates(tmp_path)
    options = {"ca_certs": made.ca, "certfile": None, "keyfile": None, "cert_reqs": ssl.CERT_REQUIRED}
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        accepted = pool.submit(lambda: listener.accept()[0])
        if request.param == "plain":
            ours = Socket(host, connect_timeout=5)
        else:
            ours = SecureSocket(host, connect_timeout=5, ssl={**options, "server_hostname": "localhost"})
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*made.server)
            accepted = pool.submit(lambda plain: context.wrap_socket(plain.result(), server_side=True), accepted)
        ours.connect()
        with accepted.result(5) as theirs:
            yield ours, theirs
            ours.close()


def read(ours):
    """As an event loop does."""
    with ours.having_timeout(0):
        return ours.read_frame()


@pytest.mark.parametrize("cut", [1, 7, 8, 20, len(FRAME) - 1])
def test_a_frame_whose_rest_is_missing_is_not_waited_for_and_read_when_the_rest_is_there(cut, pair):
    """py-amqp would try again without a pause, as long as the network is cut."""
    ours, theirs = pair
    theirs.sendall(FRAME[:cut])
    assert select.select([ours.sock], [], [], 5)[0]
    for _ in range(3):
        with took_less_than(1), pytest.raises(TimeoutError):
            read(ours)
    theirs.sendall(FRAME[cut:] + FRAME)
    assert select.select([ours.sock], [], [], 5)[0]
    for _ in range(2):
        channel, payload = read(ours)[1:]
        assert (channel, bytes(payload)) == (7, b"x" * 20)
    assert ours.connected


def test_closing_does_not_wait_for_a_broker_that_is_frozen(pair):
    ours, _ = pair
    ours.sock.settimeout(3)
    with took_less_than(1):
        ours.close()
    assert not ours.connected


def test_what_has_arrived_together_is_read_at_once(pair):
    ours, theirs = pair
    ours.read_ahead()
    theirs.sendall(FRAME * 3 + FRAME[:9])
    assert select.select([ours.sock], [], [], 5)[0]
    for _ in range(3):
        assert bytes(ours.read_frame()[2]) == b"x" * 20
        assert ours.has_more
    theirs.sendall(FRAME[9:])
    assert bytes(ours.read_frame()[2]) == b"x" * 20
    assert not ours.has_more


def test_a_connection_that_the_broker_ends_before_it_is_open_is_closed(monkeypatch):
    def ended(*_, **__):
        raise ConnectionForced("the broker stops")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection(host=f"127.0.0.1:{listener.getsockname()[1]}", connect_timeout=5)
        monkeypatch.setattr(connection, "drain_events", ended)
        with pytest.raises(ConnectionForced):
            connection.connect()
        with listener.accept()[0] as theirs:
            theirs.settimeout(5)
            while theirs.recv(100):
                pass  # it has said hello
