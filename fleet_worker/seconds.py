"""A number of seconds on a command line."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import click


class Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        with suppress(ValueError):
            if not math.isnan(float(value)):
                return float(super().convert(value, param, ctx))
        option = param.opts[0] if param else "this option"
        before = f"; put the node before it: fleet-worker drain {value} {option}" if "@" in str(value) else ""
        raise click.BadParameter(f"it takes a number of seconds{before}", ctx, param)
