"""What checks find: gathered from all of them at the same time, shown, and summed up in an exit code."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet_worker import exit_codes
from fleet_worker.errors import BrokerUnavailable, FleetError
from fleet_worker.ops.terminal import printable

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report. No password and no key is in any of its texts."""

    severity: Severity
    check: str
    found: str
    advice: str = ""


def at_once(checks: Mapping[str, Callable[[], Iterable[Finding]]], within: float) -> list[Finding]:
    """Run checks, named by their titles, and return what they find in this order; never raises.

    A check that fails, or takes longer than `within` seconds, is a finding itself.
    """
    deadline = time.monotonic() + within
    running = {title: _started(title, check) for title, check in checks.items()}
    findings: list[Finding] = []
    for title, outcome in running.items():
        try:
            findings += outcome.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            findings.append(Finding("error", title, f"not finished within {within:g} s", "see what is slow or frozen"))
    return findings


def _started(title: str, check: Callable[[], Iterable[Finding]]) -> Future[list[Finding]]:
    outcome: Future[list[Finding]] = Future()
    # As a daemon, since nothing ends a thread that hangs: in looking up the name of a host, for example.
    threading.Thread(target=lambda: outcome.set_result(_found(title, check)), name=title, daemon=True).start()
    return outcome


def _found(title: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except BrokerUnavailable:
        return [
            Finding("warning", title, "not checked: the broker could not be asked", "see what is said of the broker")
        ]
    except FleetError as error:
        return [Finding("error", title, error.message)]
    except Exception as error:  # its text may repeat a secret
        return [Finding("error", title, f"the check itself failed ({type(error).__name__})", "look at it by hand")]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 if all is well, 1 after warnings, 2 after errors, 78 if the configuration cannot be used."""
    found = {(finding.check, finding.severity) for finding in findings}
    if ("configuration", "error") in found:
        return exit_codes.CONFIGURATION
    severities = {severity for _, severity in found}
    return 2 if "error" in severities else 1 if "warning" in severities else 0


def show(findings: Sequence[Finding], *, as_json: bool = False) -> None:
    """Print a table on a terminal; elsewhere, and as JSON, a line for each finding."""
    console = Console()
    if as_json:
        lines = [json.dumps(asdict(finding)) for finding in findings]
    elif console.is_terminal:
        return console.print(_table(findings))
    else:
        width = max(len(finding.check) for finding in findings)
        lines = [_line(finding, width) for finding in findings]
    return click.echo("\n".join(lines))


def _line(finding: Finding, width: int) -> str:
    advice = f" -> {finding.advice}" if finding.advice else ""
    return printable(f"{finding.severity:<8} {finding.check:<{width}}  {finding.found}{advice}")


def _table(findings: Sequence[Finding]) -> Table:
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table("", "Check", "Found", "What to do", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        texts = (finding.check, finding.found, finding.advice)
        table.add_row(
            Text(finding.severity, style=colours[finding.severity]), *(Text(printable(text)) for text in texts)
        )
    return table
