"""Gateways for tests: real processes that serve HTTP, and the HTTP alone."""

import asyncio
import http.client
import socket
import tempfile
import threading
from contextlib import ExitStack, contextmanager

from fleet_worker import Router
from fleet_worker.gateway.accounts.keys import Keys
from fleet_worker.gateway.accounts.quotas import Quotas
from fleet_worker.gateway.app import Gateway
from fleet_worker.gateway.records import Records
from fleet_worker.gateway.serve import Server
from fleet_worker.host.child_process import child, python
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker, running_host

READY_WITHIN = 20.0


@contextmanager
def running_gateway(broker_url, *, connected=True, **settings):
    """Run `fleet-worker gateway` with these settings; yield its process, which has its `url`."""
    env = {f"FLEET_GATEWAY__{name.upper()}": str(value) for name, value in {"port": 0, **settings}.items()}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-gateway-"))
        env |= {"FLEET_BROKER_URL": broker_url, "FLEET_STATE_DIR": folder}
        process = stack.enter_context(child("gateway", python("-m", "fleet_worker", "gateway"), env))
        line = process.wait_for("serves ", READY_WITHIN)
        process.url = line.split("serves ")[1].split()[0]
        if connected:
            process.wait_for("knows the models", READY_WITHIN)
        yield process


@contextmanager
def gateway_of(mlx):
    """Run a gateway, and a fleet of this one simulated server; yield the process of the gateway."""
    models = {model: {"features": {"vision": True, "tools": True}} for model in mlx.models}
    instance = {"base_url": mlx.base_url, "limits": {"concurrency": 8}, "models": models}
    with embedded_broker() as url, running_host(url, {"sim": instance}), running_gateway(url) as process:
        yield process


@contextmanager
def serving(app=None, **settings):
    """Serve HTTP in a thread of this process, without any fleet; yield the port. `app`: instead of the gateway."""
    folder = tempfile.TemporaryDirectory()
    settings = Settings(broker_url="redis://127.0.0.1:1", state_dir=folder.name, gateway={"port": 0, **settings})
    keys = Keys.load(settings.gateway.keys)
    with folder, Router(settings) as router, socket.create_server(("127.0.0.1", 0)) as listener:
        quotas = Quotas(settings, gateway="test")
        records = Records(NoLedger(), lambda: quotas.are_shared)
        server = Server(settings, app or Gateway(settings, router, keys, quotas, records), keys, quotas)
        thread = threading.Thread(target=asyncio.run, args=[server.serve([listener])])
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = server.force_exit = True
        thread.join(10)


class NoLedger:
    """Keeps nothing."""

    dropped = 0

    def add(self, row):
        pass


class Wire:
    """One connection, on which anything can be sent."""

    def __init__(self, port, **options):
        self.socket = socket.socket()
        for name, value in options.items():
            self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        self.socket.settimeout(5)
        self.socket.connect(("127.0.0.1", port))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)
        return self

    def answer(self):
        """Return the next answer, which has its `body`. It must be the only one that was sent so far."""
        answer = http.client.HTTPResponse(self.socket)
        answer.begin()
        answer.body = answer.read()
        return answer

    def rest(self):
        """Return all that comes until the other end closes the connection."""
        parts = []
        while part := self.socket.recv(1 << 20):
            parts.append(part)
        return b"".join(parts)

    @property
    def is_closed(self):
        """Wait for the other end to close it."""
        try:
            return not self.rest()
        except ConnectionError:
            return True


def ask(port, data):
    """Send this and return the answer."""
    with Wire(port) as wire:
        return wire.send(data).answer()


def post(body=b"{}", *headers, path=b"/v1/chat/completions", version=b"1.1", length=None):
    """Return the bytes of a request. Headers are bytes, as in b"expect: 100-continue"."""
    length = b"content-length: %d" % (len(body) if length is None else length)
    head = [b"POST %b HTTP/%b" % (path, version), b"host: localhost", length, *headers]
    return b"\r\n".join([*head, b"", body])


def chunked(rest, *headers):
    """Return the bytes of a request whose body comes in chunks; `rest` is what comes after its head."""
    head = [b"POST /v1/chat/completions HTTP/1.1", b"host: localhost", b"transfer-encoding: chunked", *headers]
    return b"\r\n".join([*head, b"", rest])


def get(path=b"/v1/models", *headers):
    return b"\r\n".join([b"GET %b HTTP/1.1" % path, b"host: localhost", *headers, b"", b""])
