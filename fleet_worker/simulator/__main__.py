"""The simulated MLX server as a process; the options of `SimulatedMLX` are the options here."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fleet_worker.simulator.machine import Machine
from fleet_worker.simulator.replies import Fault
from fleet_worker.simulator.server import SimulatedMLX
from fleet_worker.simulator.servers import FLAVOURS


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT (0), or until a fault kills the server (137, as a shell reports SIGKILL)."""
    options = _options(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with SimulatedMLX(**options) as server:
        sys.stdout.write(json.dumps({"base_url": server.base_url, "pid": os.getpid()}) + "\n")
        sys.stdout.flush()
        server.wait_until_killed()
    return 128 + signal.SIGKILL


def _options(arguments: Sequence[str] | None) -> Mapping[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m fleet_worker.simulator",
        description="A simulated MLX server. Times are seconds, rates are tokens a second. What each option means is "
        "written beside the fields of Machine, in machine.py of this package.",
    )
    parser.add_argument("--model", action="append", dest="models", help="a model that it serves; may be repeated")
    parser.add_argument("--listed", action="append", help="a model that /v1/models lists; may be repeated")
    parser.add_argument("--reasoning", action="append", help="a token of reasoning before every reply; may be repeated")
    parser.add_argument("--tool-calls", type=json.loads, help="JSON")
    parser.add_argument("--faults", type=lambda text: [Fault(**fault) for fault in json.loads(text)], help="JSON")
    for option in fields(Machine):
        flag = "--" + option.name.replace("_", "-")
        if isinstance(option.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif isinstance(option.default, int | float | str):
            choices = list(FLAVOURS) if option.name == "flavour" else None
            parser.add_argument(flag, type=type(option.default), choices=choices, help=f"default: {option.default}")
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
