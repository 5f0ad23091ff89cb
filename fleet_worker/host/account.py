"""The account of a person, under which a service of the whole system runs."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from fleet_worker.errors import ConfigurationError

ROOT = "root"


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this host."""

    name: str
    uid: int
    gid: int
    home: Path


def account(name: str | None = None) -> Account:
    """Return the account of this name; without a name, that of the person who runs this process, also by sudo.

    Raises:
        ConfigurationError: there is no such user, or root runs this without sudo and names nobody.
    """
    person = name or (os.environ.get("SUDO_USER") if is_root() else pwd.getpwuid(os.geteuid()).pw_name)
    if not person:
        raise ConfigurationError("root runs this, without sudo: --user NAME tells whose service it is")
    try:
        entry = pwd.getpwnam(person)
    except KeyError:
        raise ConfigurationError(f"this host has no user {person!r}") from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


def is_root() -> bool:
    return os.geteuid() == 0
