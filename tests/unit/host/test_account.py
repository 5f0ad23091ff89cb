"""Under whose account a service of the system runs."""

import os
import pwd
from pathlib import Path

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.account import Account, account

PEOPLE = {"op": 501, "root": 0, "guest": 502}


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A host with some people; `host(name)` tells who runs this process."""

    def entry(name, uid):
        return pwd.struct_passwd((name, "x", uid, 20, "", f"/Users/{name}", "/bin/sh"))

    def by_name(name):
        return entry(name, PEOPLE[name])

    def runs_as(name):
        monkeypatch.setattr(os, "geteuid", lambda: PEOPLE[name])

    monkeypatch.setattr(pwd, "getpwnam", by_name)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: next(entry(n, u) for n, u in PEOPLE.items() if u == uid))
    monkeypatch.delenv("SUDO_USER", raising=False)
    return runs_as


OP = Account("op", 501, 20, Path("/Users/op"))


def test_it_is_that_of_the_person_who_runs_this(host):
    host("op")
    assert account() == OP


def test_by_sudo_it_is_that_of_the_person_too(host, monkeypatch):
    host("root")
    monkeypatch.setenv("SUDO_USER", "op")
    assert account() == OP


def test_a_variable_alone_makes_nobody_another_person(host, monkeypatch):
    host("guest")
    monkeypatch.setenv("SUDO_USER", "op")
    assert account().name == "guest"


def test_root_without_sudo_has_to_say_whose_it_is(host):
    host("root")
    with pytest.raises(ConfigurationError, match="root runs this, without sudo: --user NAME"):
        account()
    assert account("op") == OP
    assert account("root").uid == 0


def test_a_user_that_is_not_there_is_named(host):
    host("root")
    with pytest.raises(ConfigurationError, match="this host has no user 'nobody-here'"):
        account("nobody-here")
