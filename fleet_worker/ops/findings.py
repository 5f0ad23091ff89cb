"""Findings of checks: collected from all checks at the same time, printed, and summed up in an exit code."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import click

from fleet_worker import exit_codes
from fleet_worker.errors import BrokerUnavailable, FleetError
from fleet_worker.terminal import Listing, cell, output, printable

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check. None of its texts contains a password or a key."""

    severity: Severity
    check: str = field(default="", kw_only=True)
    """The title of its check, which `at_once` fills in."""
    found: str
    advice: str = ""


def at_once(checks: Mapping[str, Callable[[], Iterable[Finding]]], within: float) -> list[Finding]:
    """Run checks, by their titles, in parallel, and return their findings in this order. Never raises.

    A check that fails, or takes longer than `within` seconds, is a finding itself.
    """
    deadline = time.monotonic() + within
    running = {title: _started(check) for title, check in checks.items()}
    findings: list[Finding] = []
    for title, outcome in running.items():
        try:
            found = outcome.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            found = [Finding("error", f"not finished within {within:g} s", "see what is slow or frozen")]
        findings += (replace(each, check=each.check or title) for each in found)
    return findings


def _started(check: Callable[[], Iterable[Finding]]) -> Future[list[Finding]]:
    outcome: Future[list[Finding]] = Future()
    # A daemon thread: nothing can end one that hangs, for example in resolving a host name.
    threading.Thread(target=lambda: outcome.set_result(_findings(check)), daemon=True).start()
    return outcome


def _findings(check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except BrokerUnavailable:
        return [Finding("warning", "not checked: the broker does not answer", "follow the advice about the broker")]
    except FleetError as error:
        return [Finding("error", error.message)]
    except Exception as error:  # its text may contain a secret
        return [Finding("error", f"the check itself failed ({type(error).__name__})", "check it by hand")]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 if all is well, 1 after warnings, 2 after errors, 78 if the configuration cannot be used."""
    found = {(finding.check, finding.severity) for finding in findings}
    if ("configuration", "error") in found:
        return exit_codes.CONFIGURATION
    severities = {severity for _, severity in found}
    return 2 if "error" in severities else 1 if "warning" in severities else 0


def show(findings: Sequence[Finding], *, as_json: bool = False) -> None:
    """Print a listing on a terminal; elsewhere, and as JSON, one line per finding."""
    console = output()
    if as_json:
        click.echo("\n".join(json.dumps(asdict(finding)) for finding in findings))
    elif console.is_terminal:
        console.print(_listing(findings))
    else:
        width = max(len(finding.check) for finding in findings)
        for each in findings:
            advice = f" -> {each.advice}" if each.advice else ""
            click.echo(printable(f"{each.severity:<8} {each.check:<{width}}  {each.found}{advice}"))


def _listing(findings: Sequence[Finding]) -> Listing:
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    # Wide enough that a command or a path, which one wants to copy, is seldom folded.
    listing = Listing("", "Check", "Found", "What to do", whole=("",), fits=100)
    for finding in findings:
        texts = (finding.check, finding.found, finding.advice)
        listing.add(cell(finding.severity, colours[finding.severity]), *map(cell, texts))
    return listing
