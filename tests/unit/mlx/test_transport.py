"""How a client reaches its server: host names, TLS, and what it leaves open."""

import ssl
import subprocess
import time
from contextlib import closing

import httpx
import pytest

from fleet_worker.errors import InstanceUnavailable
from tests.clients import Client, answering, cancelled, said, served, took_less_than

HEAD = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
CERTIFICATE = "-newkey rsa:2048 -nodes -days 1 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """The TLS context of a server, and the certificate file for its clients."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", *CERTIFICATE.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


@pytest.fixture
def trusted(tls, monkeypatch):
    context = ssl.create_default_context(cafile=tls[1])
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: context)


def test_a_host_may_have_several_addresses():
    """localhost may be ::1 first, where the server does not listen."""
    with served() as (server, _), closing(Client(f"http://localhost:{server.port}")) as client:
        assert client.ask().finish_reason == "stop"


def test_a_host_that_does_not_exist_is_unavailable():
    with closing(Client("http://fleet.invalid", clocks={"connect": 0.1})) as client, pytest.raises(InstanceUnavailable):
        client.ask()


@pytest.mark.usefixtures("trusted")
def test_a_chat_over_tls(tls):
    with answering(HEAD + said("Hi"), tls[0]) as url, closing(Client(url)) as client:
        assert client.ask().content == "Hi"


@pytest.mark.usefixtures("trusted")
def test_a_cancel_over_tls(tls):
    """The connect timeout, which limits the handshake, has passed by then."""
    with (
        answering(HEAD, tls[0]) as url,
        closing(Client(url, clocks={"connect": 0.2})) as client,
        cancelled(client.ask),
    ):
        time.sleep(0.3)


def test_a_server_that_nobody_vouches_for_gets_no_request(tls):
    with (
        answering(HEAD + said("Hi"), tls[0]) as url,
        closing(Client(url, clocks={"connect": 0.1})) as client,
        pytest.raises(InstanceUnavailable),
    ):
        client.ask()


def test_a_tls_handshake_has_the_time_of_connecting():
    with (
        answering("") as url,
        closing(Client(url.replace("http", "https"), clocks={"connect": 0.1})) as client,
        took_less_than(5),
        pytest.raises(InstanceUnavailable),
    ):
        client.ask()
