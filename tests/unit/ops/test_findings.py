import json
import re
import threading
import time

import pytest

from fleet_worker.errors import BrokerUnavailable, Unauthorized
from fleet_worker.ops.findings import Finding, at_once, exit_code, show

OK = Finding("ok", "fine", check="first")
WARNING = Finding("warning", "so so", "do this", check="the second")
ERROR = Finding("error", "broken [bold]", "do that", check="third")
UNUSABLE = Finding("error", "no TOML", check="configuration")


def raising(error):
    def check():
        yield OK
        raise error

    return check


def test_findings_are_in_the_order_of_their_checks_whichever_ends_first():
    last_is_done = threading.Event()

    def slow():
        assert last_is_done.wait(5)
        return [OK, WARNING]

    def fast():
        last_is_done.set()
        return [ERROR]

    assert at_once({"slow": slow, "none": list, "fast": fast}, 5) == [OK, WARNING, ERROR]


def test_a_finding_is_named_after_its_check_unless_it_has_a_name():
    found = at_once({"outer": lambda: [Finding("ok", "fine"), OK]}, 5)
    assert [finding.check for finding in found] == ["outer", "first"]


def test_a_check_that_fails_shows_nothing_but_the_type():
    (finding,) = at_once({"odd": raising(ValueError("hush-hush"))}, 5)
    assert (finding.severity, finding.check) == ("error", "odd")
    assert "ValueError" in finding.found
    assert "hush" not in str(finding)


def test_an_error_of_ours_has_a_text_that_may_be_shown():
    assert at_once({"odd": raising(Unauthorized("no"))}, 5) == [Finding("error", "no", check="odd")]


def test_without_a_broker_what_needs_it_is_only_a_warning():
    """The broker itself is the error."""
    (finding,) = at_once({"odd": raising(BrokerUnavailable("gone"))}, 5)
    assert finding.severity == "warning"


def test_a_check_that_hangs_does_not_delay_the_others():
    end = threading.Event()
    started = time.monotonic()
    late, fine = at_once({"hanging": end.wait, "fine": lambda: [OK]}, 0.2)
    assert time.monotonic() - started < 2
    end.set()
    assert (late.severity, late.check, late.found) == ("error", "hanging", "not finished within 0.2 s")
    assert fine == OK


def test_a_check_that_hangs_does_not_keep_the_process_alive():
    (finding,) = at_once({"any": lambda: [Finding("ok", str(threading.current_thread().daemon))]}, 5)
    assert finding.found == "True"


@pytest.mark.parametrize("order", [1, -1])
def test_the_exit_code_is_that_of_the_worst_finding(order):
    expected = {(): 0, (OK,): 0, (OK, WARNING): 1, (OK, WARNING, ERROR): 2, (UNUSABLE, ERROR, WARNING): 78}
    assert {found: exit_code(found[::order]) for found in expected} == expected


def test_a_warning_about_the_configuration_is_a_warning():
    assert exit_code([Finding("warning", "readable by all", check="configuration")]) == 1


def test_without_a_terminal_a_finding_is_a_line(capsys):
    show([OK, WARNING, ERROR])
    assert capsys.readouterr().out.splitlines() == [
        "ok       first       fine",
        "warning  the second  so so -> do this",
        "error    third       broken [bold] -> do that",
    ]


def test_as_json_a_finding_is_an_object(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show([OK, WARNING], as_json=True)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"severity": "ok", "check": "first", "found": "fine", "advice": ""}
    assert second == {"severity": "warning", "check": "the second", "found": "so so", "advice": "do this"}


LONG = Finding("error", "word " * 30, "broken [bold]", check="third")


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a terminal of that kind, with so many columns."""

    def terminal(kind, columns):
        monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
        monkeypatch.setenv("TERM", kind)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.delenv("NO_COLOR", raising=False)

    return terminal


def test_on_a_terminal_it_is_a_table_as_wide_as_that(capsys, terminal):
    terminal("xterm", 100)
    show([OK, LONG])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4
    assert "What to do" in lines[0]
    assert "\x1b[" in lines[0]
    assert any("[bold]" in line for line in lines)


def test_on_a_dumb_terminal_there_are_no_colours(capsys, terminal):
    terminal("dumb", 80)
    show([OK, LONG])
    lines = capsys.readouterr().out.splitlines()
    assert "  What to do  broken [bold]" in map(str.rstrip, lines)
    assert not any("\x1b" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_path_is_whole_on_a_terminal_of_80_columns(capsys, terminal):
    terminal("dumb", 80)
    show([Finding("warning", "so so", f"chmod o-r {(path := '/Users/fleet/configuration/of/this/host/worker.toml')}")])
    assert f"  What to do  chmod o-r {path}" in capsys.readouterr().out


def test_on_a_narrow_terminal_every_finding_is_a_paragraph(capsys, terminal):
    terminal("xterm", 40)
    show([WARNING, LONG])
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert [line.rstrip() for line in lines[:4]] == [
        "warning",
        "  Check       the second",
        "  Found       so so",
        "  What to do  do this",
    ]
    assert "".join(lines).count("word") == 30
    assert max(map(len, lines)) <= 40


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("written", ["two\nlines", "\x1b]0;title\x07"])
def test_text_of_other_hosts_cannot_control_the_terminal(colour, written, capsys, monkeypatch):
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
    show([Finding("error", written, check="third")])
    out = capsys.readouterr().out
    assert "two?lines" in out or "?]0;title?" in out
