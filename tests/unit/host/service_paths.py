"""Paths that the file of a service has to name as they are."""

import sys
from pathlib import Path

import pytest

from fleet_worker.host.account import Account
from fleet_worker.host.launchd import Launchd
from fleet_worker.host.service_files import ENDS_WITHIN
from fleet_worker.host.systemd import Systemd

CONFIG = Path("/etc/fleet/worker.toml")
HOME = Path("/Users/op")
OP = Account("op", 501, 20, HOME)
PYTHON = "/opt/fleet/bin/python3"
FOLDERS = ["plain", "with a space", "100%h %n", "größer 東京 🚢", "$HOME ${HOME}", "a;b # c", "&amp; <b>"]
QUOTES = ['say "hi"', "it's", "back\\slash \\n"]


def text_of(manager, config=CONFIG, *, interpreter=PYTHON, home=HOME, ends_within=ENDS_WITHIN, of_system=None):
    """The file of a service that this interpreter runs, for a user with this home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(interpreter))
        patch.setattr(Path, "home", lambda: home)
        return manager(ends_within, of_system).text(config)


def launchd_plist(config=CONFIG, **values):
    return text_of(Launchd, config, **values).encode()


def systemd_unit(config=CONFIG, **values):
    return text_of(Systemd, config, **values)
