"""The real brokers that tests run on, each a process of ours that can be stopped and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest
import redis

from fleet_worker.host.child_process import ChildProcess, child, free_port
from fleet_worker.testing import VALKEY_READY, valkey_command
from tests.tls import Certificates, Pair, Proxy

RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the script of Debian's package that does not change user

any_broker = pytest.mark.parametrize("broker", ["valkey"], indirect=True)
"""The mark of a test of what does not depend on the broker: Valkey is enough, in both runs."""


def missing(what: str) -> None:
    """Skip on a developer's machine, fail in CI: there it must not be missing."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@dataclass(frozen=True)
class Secured:
    """What asks clients for a certificate, and shows them one for localhost, or the one that `show` is called with."""

    url: str
    certificates: Certificates
    show: Callable[[Pair], None]

    @property
    def files(self) -> dict[str, str]:
        """Settings with which a client is accepted, and accepts it."""
        cert, key = self.certificates.client
        return {"broker_ca": str(self.certificates.ca), "broker_cert": str(cert), "broker_key": str(key)}


class Valkey:
    """On a free port of 127.0.0.1. Without a folder to keep its data in, a restart forgets everything."""

    name = "valkey"

    def __init__(self, folder: Path | None = None) -> None:
        self._stack = ExitStack()
        lasting = ["--appendonly", "yes"] if folder else []
        folder = folder or Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-valkey-")))
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self._command = [*valkey_command(port, folder), *lasting]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._stack.close()

    @property
    def pid(self) -> int:
        return self._server.pid

    def start(self) -> None:
        self._server = ChildProcess("Valkey", self._command)
        self._server.wait_for(VALKEY_READY, 30)

    def stop(self) -> None:
        self._server.stop()

    def connections(self) -> set[str]:
        """The ids of all open connections."""
        with redis.Redis.from_url(self.url, single_connection_client=True) as client:
            return {each["id"] for each in client.client_list()} - {str(client.client_id())}

    def drop_connections(self, ids: Iterable[str] | None = None) -> None:
        """Drop these, or all but those that only subscribe."""
        with redis.Redis.from_url(self.url) as client:
            if ids is None:
                client.client_kill_filter(_type="normal", skipme=True)
            for each in ids or ():
                client.client_kill_filter(_id=each)

    def endless_reply_queues(self) -> list[str]:
        """Reply queues that no time to live will remove."""
        with redis.Redis.from_url(self.url) as client:
            return [key for key in client.scan_iter("llm.fleet.reply.*") if client.ttl(key) == -1]

    def has(self, key: str) -> bool:
        with redis.Redis.from_url(self.url) as client:
            return bool(client.exists(key))

    def inventory(self) -> dict[str, int]:
        """Every key that does not expire by itself, with its size."""
        with redis.Redis.from_url(self.url) as client:
            sizes = {b"set": client.scard, b"list": client.llen, b"hash": client.hlen, b"zset": client.zcard}
            lasting = [key for key in client.scan_iter() if client.ttl(key) == -1]
            return {key.decode(): sizes.get(client.type(key), client.strlen)(key) for key in lasting}

    @contextmanager
    def secured(self) -> Iterator[Secured]:
        with tempfile.TemporaryDirectory(prefix="fleet-tls-") as folder:
            certificates = Certificates(Path(folder))
            with Proxy(certificates, urlsplit(self.url).port, asks=True) as proxy:
                yield Secured(f"rediss://localhost:{proxy.port}/0", certificates, proxy.show)

    def signal(self, number: signal.Signals) -> None:
        self._server.signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._server.stop()


class RabbitMQ:
    """A node of its own on free ports of 127.0.0.1, with an epmd of its own.

    `root` is a folder with a Debian whose RabbitMQ is used instead of the installed one; `config` are the lines of its
    configuration file.
    """

    name = "rabbitmq"

    def __init__(self, *, root: Path | None = None, config: str = "") -> None:
        if not root and not RABBITMQ.exists():
            missing("RabbitMQ is not installed (apt-get install rabbitmq-server)")
        self._stack = ExitStack()
        self._chroot = ["chroot", str(root)] if root else []
        parent = root / "tmp" if root else None
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-rabbitmq-", dir=parent)))
        self._home = f"/{folder.relative_to(root)}" if root else str(folder)
        self._port, self._tls_port, dist_port, epmd_port = free_port(), free_port(), free_port(), free_port()
        self._certificates = Certificates(folder)
        self._shown = Pair(folder / "shown.cert.pem", folder / "shown.key.pem")
        self._show(self._certificates.server)
        (folder / "rabbitmq.conf").write_text(f"{config}\n{self._tls_configuration()}", "utf-8")
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        self._env = {
            "HOME": self._home,
            "RABBITMQ_NODENAME": f"fleet{self._port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": f"{self._home}/db",
            "RABBITMQ_LOG_BASE": f"{self._home}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": f"{self._home}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{self._home}/plugins",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd_port),
        }

    def _tls_configuration(self) -> str:
        """Only a client with a certificate is accepted."""
        files = {"cacertfile": self._certificates.ca, "certfile": self._shown.cert, "keyfile": self._shown.key}
        options = {name: f"{self._home}/{file.name}" for name, file in files.items()}
        options |= {"verify": "verify_peer", "fail_if_no_peer_cert": "true"}
        lines = [f"ssl_options.{name} = {value}" for name, value in options.items()]
        return "\n".join([f"listeners.ssl.1 = 127.0.0.1:{self._tls_port}", *lines])

    def _show(self, pair: Pair) -> None:
        for source, target in zip(pair, self._shown, strict=True):
            target.write_bytes(source.read_bytes())

    @contextmanager
    def secured(self) -> Iterator[Secured]:
        def show(pair: Pair) -> None:
            self._show(pair)
            self.control("eval", "ssl:clear_pem_cache().")

        yield Secured(f"amqps://guest:guest@localhost:{self._tls_port}//", self._certificates, show)
        if self._shown.cert.read_bytes() != self._certificates.server.cert.read_bytes():
            show(self._certificates.server)

    def __enter__(self) -> Self:
        epmd = [*self._chroot, "/usr/bin/epmd"] if self._chroot else [shutil.which("epmd") or "epmd"]
        self._stack.enter_context(child("epmd", [*epmd, "-port", self._env["ERL_EPMD_PORT"]], self._env))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._stack.close()

    def start(self) -> None:
        self._server = ChildProcess("RabbitMQ", [*self._chroot, str(RABBITMQ)], self._env)
        self._server.wait_for("Server startup complete", 90)

    def stop(self) -> None:
        self._server.stop(grace=30)

    def connections(self) -> set[str]:
        """The ids of all open connections."""
        return set(self.control("list_connections", "pid", "--no-table-headers", "--silent").split())

    def drop_connections(self, ids: Iterable[str] | None = None) -> None:
        if ids is None:
            self.control("close_all_connections", "dropped by a test")
        for each in ids or ():
            self.control("close_connection", each, "dropped by a test")

    def endless_reply_queues(self) -> list[str]:
        queues = json.loads(self.control("list_queues", "name", "arguments", "--formatter", "json", "--silent"))
        replies = [queue for queue in queues if queue["name"].startswith("llm.fleet.reply.")]
        return [queue["name"] for queue in replies if "x-expires" not in str(queue["arguments"])]

    def inventory(self) -> dict[str, int]:
        """Every queue and exchange, with how many bindings it has."""
        bindings = json.loads(
            self.control("list_bindings", "source_name", "destination_name", "--formatter", "json", "--silent")
        )
        names = [
            each["name"]
            for what in ("list_queues", "list_exchanges")
            for each in json.loads(self.control(what, "name", "--formatter", "json", "--silent"))
        ]
        return {name: sum(name in each.values() for each in bindings) for name in names}

    def signal(self, number: signal.Signals) -> None:
        """To the script and to all that it has started, which are one process group."""
        os.killpg(self._server.pid, number)
        while number == signal.SIGSTOP and not self._stopped():  # its threads stop one after the other
            time.sleep(0.01)

    def _stopped(self) -> bool:
        states = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], check=True, capture_output=True, text=True).stdout
        group = [state for pgid, state in map(str.split, states.splitlines()) if pgid == str(self._server.pid)]
        return all(state.startswith(("T", "Z")) for state in group)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._server.stop()

    def set_env(self, name: str, value: int) -> None:
        self.control("eval", f"application:set_env(rabbit, {name}, {value}).")

    def delete_queue(self, name: str) -> None:
        self.control("delete_queue", name)

    def control(self, *arguments: str) -> str:
        program = [*self._chroot, str(RABBITMQ.with_name("rabbitmqctl"))]
        command = [*program, "-n", self._env["RABBITMQ_NODENAME"], *arguments]
        return subprocess.run(command, env={**os.environ, **self._env}, check=True, capture_output=True).stdout.decode()


BROKERS = {"valkey": Valkey, "rabbitmq": RabbitMQ}
