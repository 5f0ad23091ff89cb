"""The command line of a managed server: its words, its port, its variables."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fleet_worker.errors import ConfigurationError
from fleet_worker.hugging_face import hub_folder
from fleet_worker.instance_settings import PORT, Instance
from fleet_worker.redaction import is_secret, secret_values

log = logging.getLogger(__name__)

MARK = "FLEET_SERVER"
"""The variable that tells, in a server and all its children, whose they are."""
SHORTEST_SECRET = 6
PROGRAMS = ("~/.local/bin", "/opt/homebrew/bin", "/usr/local/bin")
"""Folders behind the PATH of `up`: launchd gives it a short one."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server. Nothing of it may be shown but `program`: a word may be a key."""

    words: tuple[str, ...] = field(repr=False)
    variables: Mapping[str, str] = field(repr=False)
    """Those of the setting `environment`."""
    host: str
    port: int
    port_setting: str = "base_url"
    """The setting that gives its port."""

    @classmethod
    def of(cls, instance: Instance) -> ServerCommand:
        """Return that of an instance with `serve`, whose `base_url` `Settings` has completed."""
        url = urlsplit(instance.base_url or "")
        port = url.port or (443 if url.scheme == "https" else 80)
        words = tuple(os.path.expanduser(word.replace(PORT, str(port))) for word in instance.serve or ())
        secrets = {name: os.path.expanduser(text.get_secret_value()) for name, text in instance.environment.items()}
        return cls(words, secrets, url.hostname or "127.0.0.1", port)

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def fingerprint(self) -> str:
        """A hash of all of it, to compare it with that of a server that runs."""
        whole = json.dumps([self.words, sorted(self.variables.items()), self.host, self.port])
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def secrets(self) -> tuple[str, ...]:
        """What is to be hidden where the server prints it: values of its variables, and of its words."""
        of_variables = (text for name, text in self.variables.items() if is_secret(name))
        return tuple(text for text in (*of_variables, *secret_values(self.words)) if len(text) >= SHORTEST_SECRET)

    def environment(self, mark: str) -> dict[str, str]:
        """Return all variables of the server: those of this process without our own settings, and its own."""
        inherited = {name: text for name, text in os.environ.items() if not name.upper().startswith("FLEET_")}
        return {**inherited, **self.variables, "PATH": self._path(), MARK: mark}

    def make_model_cache(self) -> None:
        """Make the folder of the Hugging Face cache, if this is mlx_lm. Without the folder it answers `/v1/models` with
        no model, and prints a traceback; then its node does not find the chat template either."""
        if any("mlx_lm" in word for word in self.words):
            with contextlib.suppress(OSError):  # it prints the traceback then, and serves
                hub_folder({**os.environ, **self.variables}).mkdir(parents=True, exist_ok=True)

    def located(self) -> list[str]:
        """Return the words, the first one as the path of the program.

        Raises:
            ConfigurationError: there is no such program.
        """
        path = self._path()
        found = shutil.which(self.program, path=path)
        if not found:
            log.info("%s was looked for in %s", self.program, path)
            correct = "correct its path" if os.sep in self.program else "give its whole path"
            raise ConfigurationError(f"there is no program {self.program}, which serve names: install it, or {correct}")
        return [found, *self.words[1:]]

    def _path(self) -> str:
        """Return the PATH: the folder of this interpreter comes first, where `pip` puts the programs of packages."""
        given = self.variables.get("PATH", os.environ.get("PATH", os.defpath))
        ours = str(Path(sys.executable).parent)
        folders = [ours, *given.split(os.pathsep), *map(os.path.expanduser, PROGRAMS)]
        return os.pathsep.join(dict.fromkeys(filter(None, folders)))
