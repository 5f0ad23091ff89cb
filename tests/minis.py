"""Hosts on this one, each a real `fleet-worker up` that manages one simulated MLX server, its instance `local`."""

import http.client
import json
import os
from contextlib import closing, contextmanager
from pathlib import Path

from fleet_worker import Settings
from fleet_worker.host.child_process import free_port, python
from fleet_worker.host.up_socket import UpLink, socket_path
from fleet_worker.protocol.host_messages import HostStatus, Watch
from fleet_worker.testing import worker_toml
from tests.ups import running_up

CHAT = "sim-chat"
HELLO = [{"role": "user", "content": "Hello"}]
SLOTS = 4
UP = python("-m", "fleet_worker", "up")


class Mini:
    """One host, with a folder of its own.

    `configuration` is what its worker.toml has besides its name and its instance, `programs` are scripts that it finds
    in place of those of the system. Its server serves `model`, `slots` requests at a time.
    """

    def __init__(self, folder, name, broker_url, configuration="", *, programs=None, model=CHAT, slots=SLOTS):
        self.name, self.folder, self.port = name, Path(folder), free_port()
        self._configuration, self._model, self._slots = configuration, model, slots
        for program, script in (programs or {}).items():
            (self.folder / program).write_text(script)
            (self.folder / program).chmod(0o755)
        self.environment = {
            "FLEET_CONFIG": str(self.folder / "worker.toml"),
            "FLEET_STATE_DIR": str(self.folder / "state"),
            "FLEET_BROKER_URL": broker_url,
            "HOME": str(self.folder),
            "PATH": os.pathsep.join([str(self.folder), os.environ["PATH"]]),
        }
        self.settings = Settings(state_dir=self.folder / "state", host=name, broker_url=broker_url)
        self.status = HostStatus()
        """What its `up` has told last."""

    def configure(self, *options, **settings):
        """Write its worker.toml: its simulator gets these options, its instance these settings."""
        serve = [*python("-P", "-m", "fleet_worker.simulator"), "--port", "{port}", "--model", self._model, *options]
        instance = {"serve": serve, "base_url": f"http://127.0.0.1:{self.port}", "models": {self._model: {}}}
        text = worker_toml("local", {**instance, "limits": {"concurrency": self._slots}, **settings})
        (self.folder / "worker.toml").write_text(f'host = "{self.name}"\n{self._configuration}{text}')

    @contextmanager
    def up(self, command=UP):
        """Run its `up` as `process`."""
        link = UpLink(socket_path(self.settings.state_dir, self.name), self._take)
        link.start()
        link.send(Watch())
        with running_up(command, self.environment) as self.process:
            try:
                yield self
            finally:
                link.close()

    def _take(self, message):
        if isinstance(message, HostStatus):
            self.status = message

    @property
    def says(self):
        return self.process.output

    @property
    def server(self):
        return self.status.servers[0]

    def serves(self, restarts=0):
        """Whether its server does, after so many restarts."""
        return bool(self.status.servers) and self.server.stage == "serving" and self.server.restarts >= restarts

    def simulated(self, what, **body):
        """Ask its simulator something, or tell it."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            connection.request("POST" if body else "GET", f"/simulated/{what}", json.dumps(body))
            return json.loads(connection.getresponse().read())
