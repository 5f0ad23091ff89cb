"""What was used, by the ledgers of gateways: for operators by key, tag, model or node, and for a key its own.

used = usage(files, "model", since)       # a list of `Used`, who used most first
key_usage(files, "alice", since)          # a JSON object, for the holder of that key
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.ledger_file import read_only

By = Literal["key", "tag", "model", "node"]

NONE = "-"
"""The name for requests without a tag, or without a model or node because none had taken them."""
_NAMES: dict[By, str] = {
    "key": "requests.key",
    "tag": f"coalesce(tag.value, '{NONE}')",
    "model": f"coalesce(model, '{NONE}')",
    "node": f"coalesce(node, '{NONE}')",
}
_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@dataclass(frozen=True, slots=True)
class Used:
    """What was used under one name. A request with several tags counts for each."""

    name: str
    requests: int
    failed: int
    """Of the requests, those that ended with an error, or whose client left."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Of the tokens of prompts, those that servers had in their caches."""
    ttft: float | None
    """Seconds until the first token, on average; None if no answer had one."""
    queue_wait: float | None
    """Seconds until a node took a request, on average; None if none did."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def usage(files: Iterable[Path], by: By, since: float, *, key: str | None = None) -> list[Used]:
    """Return what was used since a time, in seconds since the epoch; only what one key has used, if it is named.

    Raises:
        ConfigurationError: a file is no ledger.
    """
    sums: dict[str, list[float]] = {}
    for file in files:
        for name, *numbers in _read(file, by, since, key):
            before = sums.get(name, [0.0] * len(numbers))
            sums[name] = [one + other for one, other in zip(before, numbers, strict=True)]
    used = [_used(name, numbers) for name, numbers in sums.items()]
    return sorted(used, key=lambda each: (-each.tokens, -each.requests, each.name))


def _read(file: Path, by: By, since: float, key: str | None) -> list[tuple[Any, ...]]:
    """Return for each name its sums: those of `Used`, and for each average its sum and the number of its values."""
    tags = "LEFT JOIN json_each(requests.tags) AS tag" if by == "tag" else ""
    query = (
        f"SELECT {_NAMES[by]}, count(*), sum(error IS NOT NULL OR status >= 400), sum(prompt_tokens), "  # noqa: S608
        "sum(completion_tokens), sum(cached_tokens), total(ttft), count(ttft), total(queue_wait), count(queue_wait) "
        f"FROM requests {tags} WHERE at >= ? AND (? IS NULL OR requests.key = ?) GROUP BY 1"
    )
    try:
        with closing(read_only(file)) as db:
            return db.execute(query, (since, key, key)).fetchall()
    except sqlite3.Error as error:
        raise ConfigurationError(f"the ledger {file} cannot be read: {error}") from None


def _used(name: str, sums: Sequence[float]) -> Used:
    *counts, ttft, ttfts, wait, waits = sums
    averages = (ttft / ttfts if ttfts else None, wait / waits if waits else None)
    requests, failed, prompt, completion, cached = map(int, counts)
    return Used(name, requests, failed, prompt, completion, cached, *averages)


def key_usage(files: Iterable[Path], key: str, since: float) -> dict[str, Any]:
    """Return what a key has used since a time, in all and by model: a JSON object."""
    models = [as_json(each, "model") for each in usage(files, "model", since, key=key)]
    counted = ("requests", "failed", "prompt_tokens", "completion_tokens", "cached_tokens")
    total = {name: sum(each[name] for each in models) for name in counted}
    return {"object": "usage", "key": key, "since": written(since), **total, "models": models}


def moment(text: str) -> float:
    """Return the time that a text means, in seconds since the epoch: `7d`, `24h`, `30m`, `2w` ago, or a date, as in
    2026-11-30 or 2026-11-30T08:00, in UTC unless it names another zone.

    Raises:
        ValueError: it means none.
    """
    if ago := re.fullmatch(r"(\d{1,6})([mhdw])", text.strip()):
        return max(0.0, time.time() - int(ago[1]) * _UNITS[ago[2]])
    try:
        date = datetime.fromisoformat(text.strip())
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("must be as 7d, 24h, 30m, or a date as 2026-11-30") from None


def as_json(used: Used, by: str) -> dict[str, Any]:
    """Return its fields, with the name as `by`."""
    fields = asdict(used)
    averages = {name: None if fields[name] is None else round(fields[name], 3) for name in ("ttft", "queue_wait")}
    return {by: fields.pop("name"), **fields, **averages}


def written(moment: float) -> str:
    """Return the text of a time."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
