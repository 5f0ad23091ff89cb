"""Messages that nobody should send, each drawn from a seed and its number: good ones, changed in one way or several."""

from __future__ import annotations

import bz2
import copy
import functools
import json
import lzma
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.faults.fuzz_samples import NOBODY, Sample

MB = 1024 * 1024
INFLATED = 128 * MB
"""Bytes that a bomb becomes."""
LARGE = {"@large@": 2 * MB, "@giant@": 40 * MB}
"""Texts that are replaced in the JSON by one of so many bytes."""
DEEP = (60, 150, 1_100, 20_000)
"""Levels of nesting; Python's JSON accepts about a thousand."""
DEEP_MARK = "@deep-{}@"
"""A text that is replaced in the JSON by nested lists, which no library writes."""

TEXTS = (
    *("", "x", "\0", "é\u2028", "\ud800", "one@test", "fleet.chat", "sim-chat", "r-1", "-1", "1e999", "NaN", "[1]"),
    *("2026-01-01T00:00:00", "2999-01-01T00:00:00+00:00", "1/h", "celery.backend_cleanup", "celery.chord", "a" * 300),
    *(
        NOBODY,
        f"{NOBODY}.nope",
        "llm.fleet.reply.x.nan",
        "llm.fleet.reply.\ud800.5",
        "llm.fleet.reply.x.1e9",
    ),
    *("registry@test", "../../etc/passwd", "uuid", "datetime", "bytes", "2.9", "%s%n", "application/json"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 1.5, -0.0, 1e300, 1e-300),
    *(float("inf"), float("nan"), [], [[]], [None], [1, 2, 3], ["x"], {}, {"a": {}}, {"": 1}, {"a": [{"b": None}]}),
    *({"__type__": "uuid", "__value__": 1}, {"__type__": "datetime", "__value__": "x"}),
    *({"__type__": "bytes", "__value__": {}}, {"__type__": "decimal", "__value__": "1e999999999"}),
    *({"exchange": "", "routing_key": NOBODY}, {"task": "celery.chord", "args": [[]], "kwargs": {}}),
    *(DEEP_MARK.format(levels) for levels in DEEP),
    *TEXTS,
)
TASK_HEADERS = (
    *("id", "task", "lang", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"),
    *("parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers"),
    *(
        "fleet_prefixes",
        "stamps",
        "delay",
        "x-delay",
        "x-death",
        "redelivered",
        "clock",
        "ticket",
        "expiration",
        "hostname",
        "utc",
    ),
    *(
        "compression",
        "callbacks",
        "errbacks",
        "chain",
        "chord",
        "submitted_at",
        "reply_to",
        "correlation_id",
        "is_eager",
    ),
)
PROPERTIES = (
    *("correlation_id", "reply_to", "delivery_mode", "delivery_info", "priority", "body_encoding", "delivery_tag"),
    *("content_type", "expiration", "message_id", "timestamp", "type", "user_id", "app_id", "cluster_id"),
)
CONTENT_TYPES = (
    *("application/json", "application/data", "application/text", "text/plain", "application/x-python-serialize"),
    *("application/x-yaml", "application/x-msgpack", "application/octet-stream", "pickle", "json", "", "x" * 200, None),
)
ENCODINGS = (
    *(
        "utf-8",
        "utf8",
        "binary",
        "ascii",
        "utf-7",
        "utf-16",
        "utf-32",
        "utf-8-sig",
        "latin-1",
        "cp037",
        "big5",
        "rot13",
    ),
    *("bz2_codec", "zlib_codec", "hex_codec", "base64_codec", "quopri_codec", "uu_codec", "idna", "punycode", "mbcs"),
    *("unicode_escape", "raw_unicode_escape", "undefined", "nope", "", None),
)
COMPRESSIONS = (
    *("zlib", "gzip", "application/x-gzip", "bzip2", "bz2", "application/x-bz2", "lzma", "xz", "application/x-lzma"),
    *("application/x-gzip-compressed", "zstd", "application/zstd", "brotli", "application/x-brotli", "", "nope", None),
)
EMBEDS = ("callbacks", "errbacks", "chain", "chord")
METHODS = (
    *("shutdown", "rate_limit", "time_limit", "cancel_consumer", "add_consumer", "pool_grow", "pool_shrink", "revoke"),
    *(
        "pool_restart",
        "autoscale",
        "terminate",
        "revoke_by_stamped_headers",
        "enable_events",
        "disable_events",
        "hello",
    ),
    *("election", "heartbeat", "memdump", "memsample", "objgraph", "report", "query_task", "clock", "stats", "conf"),
    *("ping", "active", "reserved", "scheduled", "registered", "active_queues", "revoked", "dump_conf", "process"),
)


@dataclass(frozen=True)
class Message:
    """What is sent to a `kind` of target: a sample that may be wrong in any way, or bytes in its place, which only
    Redis can carry; `copies` times."""

    kind: str
    recipe: str
    sample: Sample
    stored: bytes | None = None
    copies: int = 1

    @property
    def text(self) -> bytes:
        """What Redis is sent."""
        return as_json(self.sample.stored()) if self.stored is None else self.stored


def message(seed: int, number: int, samples: Mapping[str, Sample]) -> Message:
    """Return the message of that number. The first ones are one of each recipe for each kind."""
    draw = random.Random(f"{seed} {number}")
    kinds, recipes = sorted(samples), sorted(RECIPES)
    if number < len(kinds) * len(recipes):
        kind, name = kinds[number % len(kinds)], recipes[number // len(kinds)]
    else:
        kind, name = draw.choice(kinds), draw.choices(recipes, [RECIPES[each][0] for each in recipes])[0]
    sample = replace(copy.deepcopy(samples[kind]), body=samples[kind].body.replace(b"r-1", b"r-%d" % number))
    changed = RECIPES[name][1](draw, sample)
    if isinstance(changed, bytes):
        return Message(kind, name, sample, changed)
    return Message(kind, name, changed, copies=2 if name == "twice" else 1)


def as_json(value: Any) -> bytes:
    """Return JSON as bytes, with what no JSON library would write."""
    text = json.dumps(value)
    for levels in DEEP:
        if (mark := json.dumps(DEEP_MARK.format(levels))) in text:
            text = text.replace(mark, "[" * levels + "]" * levels, 1).replace(mark, "0")
    for mark, size in LARGE.items():
        if mark in text:
            text = text.replace(mark, "L" * size, 1).replace(mark, "")
    return text.encode()


# --- recipes: each returns a changed sample, or what Redis is sent in its place ---------------------------------------


def change_body(draw: random.Random, sample: Sample) -> Sample:
    return replace(sample, body=as_json(_changed(draw, json.loads(sample.body), draw.randint(1, 3))))


def change_beside(draw: random.Random, sample: Sample) -> Sample:
    """Headers and properties."""
    if draw.random() < 0.6 and isinstance(sample.headers, dict):
        sample.headers |= {draw.choice(TASK_HEADERS): _any(draw) for _ in range(draw.randint(1, 3))}
    else:
        names = {draw.choice(PROPERTIES): _any(draw) for _ in range(draw.randint(1, 2))}
        sample.properties = {**sample.properties, **names}
    return sample


def change_anything(draw: random.Random, sample: Sample) -> Sample:
    beside = _changed(draw, {"headers": sample.headers, "properties": sample.properties}, draw.randint(1, 3))
    beside = beside if isinstance(beside, dict) else {}
    sample.headers, sample.properties = beside.get("headers"), beside.get("properties")
    return change_body(draw, sample) if draw.random() < 0.3 else sample


def lack(draw: random.Random, sample: Sample) -> Sample:
    """Lack headers, properties or a body."""
    empty: Any = draw.choice(({}, None, [], "x", 1))
    what = draw.choice(("headers", "properties", "body"))
    return replace(sample, **{what: b"" if what == "body" else empty})


def compress(draw: random.Random, sample: Sample) -> Sample:
    name = draw.choice(COMPRESSIONS)
    body = _bomb(draw.choice(("zlib", "bz2", "lzma"))) if draw.random() < 0.5 else _packed(draw, sample.body)
    return replace(sample, body=body, headers={**(sample.headers or {}), "compression": name})


def bomb(draw: random.Random, sample: Sample) -> Sample:
    """A few hundred bytes that would become very many: by `compression`, or as a foreign encoding."""
    if draw.random() < 0.5:
        codec, name = draw.choice(
            (("zlib", "zlib"), ("zlib", "application/x-gzip"), ("bz2", "bzip2"), ("lzma", "lzma"))
        )
        return replace(sample, body=_bomb(codec), headers={**(sample.headers or {}), "compression": name})
    codec, encoding = draw.choice((("zlib", "zlib_codec"), ("bz2", "bz2_codec")))
    content_type = draw.choice(("application/data", "application/json", "text/plain"))
    return replace(sample, body=_bomb(codec), content_type=content_type, content_encoding=encoding)


def encode(draw: random.Random, sample: Sample) -> Sample:
    encoding, content_type = draw.choice(ENCODINGS), draw.choice(CONTENT_TYPES)
    body = sample.body
    if encoding in ("utf-16", "utf-32", "utf-7", "utf-8-sig", "cp037"):
        body = body.decode().encode(encoding)
    if draw.random() < 0.2:
        encoding = _any(draw)
    if draw.random() < 0.2:
        content_type = _any(draw)
    return replace(sample, body=body, content_encoding=encoding, content_type=content_type)


def other_body(draw: random.Random, sample: Sample) -> Sample:
    """A body that is something else, or none."""
    others: tuple[Callable[[], bytes], ...] = (
        lambda: as_json(_any(draw)),
        lambda: as_json([_any(draw) for _ in range(draw.randint(0, 4))]),
        lambda: as_json([[json.loads(sample.body)], {}, {name: _any(draw) for name in EMBEDS}]),
        lambda: as_json([[_any(draw)], {draw.choice(TEXTS): 1}, _any(draw)]),
        lambda: as_json({"task": "fleet.chat", "id": _any(draw), "args": _any(draw), "kwargs": {}}),
        lambda: as_json({"method": draw.choice(METHODS), "arguments": _any(draw)}),
        lambda: draw.randbytes(draw.randint(0, 60)),
        lambda: _damaged(draw, sample.body),
        lambda: b"\xef\xbb\xbf" + sample.body,
        lambda: sample.body * 2,
        lambda: b'{"a":' * 20_000,
        lambda: b'"' + b"\\ud83d" * 1000 + b'"',
        lambda: b"[" + b"1," * 50_000 + b"1]",
        lambda: b"-" + b"9" * 5_000,
    )
    return replace(sample, body=draw.choice(others)())


def other_task(draw: random.Random, sample: Sample) -> Sample:
    """A message of Celery's, as other clients could send it."""
    embed = {name: draw.choice((None, [1], ["x"], [{"task": "celery.chord"}], VALUES[7], {"a": 1})) for name in EMBEDS}
    arguments = draw.choice(([], [1], [{}], json.loads(sample.body)))
    headers = {"id": draw.choice(TEXTS), "task": draw.choice(("fleet.chat", "fleet.embed", *TEXTS)), "lang": "py"}
    return replace(sample, body=as_json([arguments, {}, embed]), headers={**headers, "eta": _any(draw)})


def order(draw: random.Random, sample: Sample) -> Sample:
    """A control command; none that a stranger may really give (`drain`)."""
    command: dict[str, Any] = {"method": draw.choice(METHODS), "arguments": draw.choice(({}, {"n": 1}, *VALUES))}
    command["destination"] = draw.choice((None, ["one@test"], ["*@test"], ["registry@test"], *VALUES))
    command["pattern"], command["matcher"] = draw.choice(((None, None), ("(a+)+$", "pcre"), ("*", "glob")))
    reply_to = {"exchange": draw.choice(("reply.llm.fleet.control.pidbox", "", *TEXTS)), "routing_key": NOBODY}
    command["reply_to"], command["ticket"] = draw.choice((reply_to, *VALUES)), draw.choice(TEXTS)
    return replace(sample, body=as_json(command))


def damage(draw: random.Random, sample: Sample) -> bytes:
    return _damaged(draw, as_json(sample.stored()))


def replace_all(draw: random.Random, sample: Sample) -> bytes:
    """No message at all."""
    raw = (
        b"",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"x" * 300_000,
        b"NaN",
    )
    return draw.choice((draw.choice(raw), as_json(_any(draw)), draw.randbytes(draw.randint(1, 200))))


def change_stored(draw: random.Random, sample: Sample) -> bytes:
    """Anything in what kombu wrote."""
    stored = sample.stored()
    if draw.random() < 0.5:
        stored[draw.choice(sorted(stored))] = _any(draw)
    return as_json(_changed(draw, stored, draw.randint(1, 3)))


def enlarge(draw: random.Random, sample: Sample) -> Sample:
    """One text of megabytes, somewhere; or very many values."""
    large = draw.choices(list(LARGE), (9, 1))[0]
    where = draw.choice(("body", "headers", "properties", "many", "other"))
    if where == "headers":
        sample.headers = {**sample.headers, draw.choice(TASK_HEADERS): large}
    elif where == "properties":
        sample.properties = {**sample.properties, draw.choice(PROPERTIES): large}
    elif where == "many":
        part = draw.choice((b"1,", b"[],", b'"",', b"{},", b'{"a":{}},'))
        sample.body = b"[[" + part * draw.choice((90_000, 1_000_000)) + b"1], {}, {}]"
    elif where == "other":
        sample.body = b"x" * LARGE[large]
    else:
        sample.body = as_json(_changed(draw, json.loads(sample.body), 1, (large,)))
    return sample


def twice(draw: random.Random, sample: Sample) -> Sample:
    """Two with one delivery tag."""
    return change_body(draw, sample) if draw.random() < 0.5 else sample


Recipe = Callable[[random.Random, Sample], Sample | bytes]
RECIPES: Mapping[str, tuple[float, Recipe]] = {
    function.__name__: (weight, function)
    for weight, function in (
        *((20.0, change_body), (20.0, change_beside), (10.0, change_anything), (3.0, lack), (3.0, compress)),
        *((0.5, bomb), (6.0, encode), (8.0, other_body), (8.0, other_task), (6.0, order), (6.0, damage)),
        *((4.0, replace_all), (6.0, change_stored), (0.5, enlarge), (2.0, twice)),
    )
}
"""By name: how often it is drawn, and what it does."""


def _any(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(VALUES))


def _changed(draw: random.Random, value: Any, times: int, values: tuple[Any, ...] = VALUES) -> Any:
    """Return JSON with so many places replaced, left out, added, or wrapped."""
    for _ in range(times):
        places = list(_places(value))
        if not places or draw.random() < 0.02:
            return copy.deepcopy(draw.choice(values))
        parent, key = draw.choice(places)
        what = draw.randrange(5)
        if what == 0 and len(values) > 1:
            del parent[key]
        elif what == 1 and isinstance(parent, dict):
            parent[draw.choice(TEXTS)] = copy.deepcopy(draw.choice(values))
        elif what == 2:
            parent[key] = [parent[key]]
        else:
            parent[key] = copy.deepcopy(draw.choice(values))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, each in inner:
        yield value, key
        yield from _places(each)


def _damaged(draw: random.Random, text: bytes) -> bytes:
    at = draw.randrange(len(text) + 1)
    end = min(len(text), at + draw.randint(0, 20))
    return draw.choice(
        (text[:at], text[:at] + draw.randbytes(3) + text[end:], text[:at] + text[at:end] * 2 + text[at:])
    )


def _packed(draw: random.Random, body: bytes) -> bytes:
    return draw.choice((zlib.compress, bz2.compress, lzma.compress, bytes))(body)


@functools.cache
def _bomb(codec: str) -> bytes:
    """Zeros that have been compressed, without having them all in memory."""
    packer: Any = {
        "zlib": zlib.compressobj,
        "bz2": bz2.BZ2Compressor,
        "lzma": functools.partial(lzma.LZMACompressor, preset=0),
    }[codec]()
    zeros = bytes(MB)
    return b"".join(packer.compress(zeros) for _ in range(INFLATED // MB)) + packer.flush()
