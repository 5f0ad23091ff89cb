"""How a client reaches its server: host names, TLS, and what it leaves open."""

import ssl
import time
from contextlib import closing

import pytest

from fleet_worker.errors import InstanceUnavailable
from tests.mlx_clients import Client, answering, cancelled, said, served, took_less_than
from tests.tls import LONG_AGO, Certificates

HEAD = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(made):
    """The TLS context of a server, whose certificate is for 127.0.0.1."""
    return context_of(made.issue("mini", "127.0.0.1"))


def context_of(pair):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    return context


def test_a_host_may_have_several_addresses():
    """localhost may be ::1 first, where the server does not listen."""
    with served() as (server, _), closing(Client(f"http://localhost:{server.port}")) as client:
        assert client.ask().finish_reason == "stop"


def test_a_host_that_does_not_exist_is_unavailable():
    with closing(Client("http://fleet.invalid", clocks={"connect": 0.1})) as client, pytest.raises(InstanceUnavailable):
        client.ask()


def test_a_chat_over_tls(made, tls):
    with answering(HEAD + said("Hi"), tls) as url, closing(Client(url, ca=made.ca)) as client:
        assert client.ask().content == "Hi"


def test_a_cancel_over_tls(made, tls):
    """The connect timeout, which limits the handshake, has passed by then."""
    with (
        answering(HEAD, tls) as url,
        closing(Client(url, ca=made.ca, clocks={"connect": 0.2})) as client,
        cancelled(client.ask),
    ):
        time.sleep(0.3)


@pytest.mark.parametrize("ca", ["none", "ca", "other_ca"])
@pytest.mark.parametrize("shown", ["good", "expired", "other host", "unknown CA"])
def test_a_server_gets_no_request_unless_its_certificate_is_good(shown, ca, made):
    """Without `ca`, only those that browsers trust are good.

    A bad one is told at once. If connecting were tried until its time is over, the last try might fail otherwise.
    """
    past = {"not_before": LONG_AGO.replace(year=2000), "not_after": LONG_AGO}
    pair = {
        "good": lambda: made.issue("good", "127.0.0.1"),
        "expired": lambda: made.issue("expired", "127.0.0.1", **past),
        "other host": lambda: made.issue("other-host", "mini.example"),
        "unknown CA": lambda: made.issue("impostor", "127.0.0.1", by="other"),
    }[shown]()
    expected = {
        ("ca", "good"): None,
        ("ca", "expired"): "has a certificate that has expired, or whose CA has: renew it",
        ("ca", "other host"): "has a certificate for another host: name the host in base_url",
        ("other_ca", "unknown CA"): None,
    }.get((ca, shown), "has a certificate of a CA that is not trusted here: set ca to")
    trusted = {} if ca == "none" else {"ca": getattr(made, ca)}
    with (
        answering(HEAD + said("Hi"), context_of(pair)) as url,
        closing(Client(url, clocks={"connect": 5.0}, **trusted)) as client,
        took_less_than(4),
    ):
        if expected is None:
            assert client.ask().content == "Hi"
        else:
            with pytest.raises(InstanceUnavailable, match=expected):
                client.ask()


def test_a_tls_handshake_has_the_time_of_connecting():
    with (
        answering("") as url,
        closing(Client(url.replace("http", "https"), clocks={"connect": 0.1})) as client,
        took_less_than(5),
        pytest.raises(InstanceUnavailable),
    ):
        client.ask()
