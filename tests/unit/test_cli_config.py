"""`--config FILE`, behind `fleet-worker` and behind each of its commands."""

import os

import click
import pytest

from fleet_worker.cli import cli
from tests.commands import fleet_worker
from tests.unit.test_cli import assert_refused


def commands_of(group, *names):
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands_of(command, *names, name)


EVERY = {" ".join(words): command for words, command in commands_of(cli)}


@pytest.fixture
def file(tmp_path):
    """A configuration without an instance, under another name than that of any error."""

    def write(name, text=""):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("command", EVERY.values(), ids=EVERY)
def test_every_command_takes_a_file(command):
    (option,) = [each for each in command.params if "--config" in each.opts]
    assert option.help


@pytest.mark.parametrize("words", ["--config {} up", "up --config {}", "--config missing.toml up --config {}"])
def test_the_file_that_is_named_last_is_read(words, file, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(file("other.toml", "nonsense = 1")))
    assert_refused(fleet_worker(words.format(file("mine.toml"))), 78, "no instance has opted in", "mine.toml")


def test_the_variable_of_a_test_stays_what_it_was(file, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", "before")
    fleet_worker(f"up --config {file('mine.toml')}")
    assert os.environ["FLEET_CONFIG"] == "before"


@pytest.mark.parametrize(
    "line", ["up --config {}", "--config {} up", "--config {} keys new alice", "status --config {}"]
)
def test_a_file_that_is_not_there_is_one_line(line, tmp_path):
    missing = tmp_path / "nowhere.toml"
    words = (f"the file {missing} of --config or FLEET_CONFIG cannot be read: No such file or directory\n",)
    assert_refused(fleet_worker(line.format(missing)), 78, *words)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("a/b", "No such file"),
        ("~nobody-here/a", "No such"),
    ],
)
def test_what_is_no_file_is_told(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(fleet_worker(f"up --config '{name}'"), 78, "of --config or FLEET_CONFIG cannot be read", reason)


def test_an_empty_name_is_a_wrong_command_line():
    done = fleet_worker("up --config ''")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Invalid value for '--config': it takes the name of a file" in done.stderr


def test_a_wrong_file_is_named(file, monkeypatch):
    wrong = file("wrong.toml", "a = ")
    assert_refused(
        fleet_worker(f"up --config {wrong}"), 78, f"the file {wrong} of --config or FLEET_CONFIG is not valid TOML"
    )
    monkeypatch.setenv("FLEET_CONFIG", str(wrong))
    assert_refused(fleet_worker("up"), 78, f"the file {wrong} of --config or FLEET_CONFIG is not valid TOML")


def test_help_needs_no_file(file):
    assert fleet_worker("--config nowhere.toml up --help").returncode == 0
    assert fleet_worker("up --config nowhere.toml --help").returncode == 0


@pytest.mark.parametrize("words", ["", *EVERY])
def test_no_line_of_help_is_wider_than_80_columns(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, fleet_worker(f"{words} --help").stdout.splitlines())) <= 80
