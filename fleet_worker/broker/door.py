"""The one door for messages from the broker: what it lets in, and what happens to the rest.

Whoever may use the broker may send anything to any queue. The channels of `redis_transport` and `amqp_transport` take
every message of every consumer (lanes, control, cancels, registry, replies) to the `Door` of their application, before
kombu or Celery interpret it. A consumer that cannot use a message either raises `Refused` from its callback, before it
has acknowledged it. The channel then acknowledges the message, and the door counts and logs it.

What comes through has a body of JSON of a bounded size, `SHORT` headers, and no other properties of its sender.
"""

from __future__ import annotations

import binascii
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import from_json

from fleet_worker.protocol.json_values import has_more_values

log = logging.getLogger(__name__)

MOST_FANOUT_BYTES = 1024 * 1024
"""Bytes of the largest message of a fanout: control commands, cancels, and what the registry publishes and is asked."""
SPARE_BYTES = 2 * 1024 * 1024
"""Bytes by which a message in a lane may exceed `max_body_bytes`: an attempt carries what earlier ones delivered."""
REPLY_SPARE_BYTES = 8 * 1024 * 1024
"""Bytes by which a message in a reply queue may exceed `max_body_bytes`: vectors take more room than their texts."""
MOST_VALUES = 51_000
"""JSON values in one message: each may take 250 bytes of memory, and a microsecond. A request has up to 50,000."""
SHORT = 1_000
"""Characters of a header's value. Longer ones, and those that are no text, number or truth value, are left out."""
MOST_HEADERS = 50
LOGGED_EVERY = 60.0
"""Seconds between two log lines about messages of one kind."""

LARGE = 64 * 1024
_BEGINNING = b'{"body": "'
"""Of a message that kombu's Redis transport has wrapped."""

EMPTY = "it is empty, or larger than any message of ours"
TOO_MANY_VALUES = "it has more JSON values than any message of ours"
NOT_JSON = "its body is not JSON in UTF-8"
FOREIGN = "its content type or encoding is not ours"
COMPRESSED = "it is compressed"


class Refused(Exception):
    """A message that this application does not use. `kind` is a fixed text; `detail` may hold a few words of the
    message, and is shortened."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = ascii(detail[:60]) if detail else ""


class Door:
    """The door of one application. Thread-safe.

    `most_bytes` is the size of the largest body that comes through.
    """

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most_bytes = most_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._dropped: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}
        """By kind: when it was logged last, and how many there were then."""

    @property
    def dropped(self) -> dict[str, int]:
        """The number of messages that were dropped since the start, by kind."""
        with self._lock:
            return dict(self._dropped)

    def drop(self, refused: Refused) -> None:
        """Count a message that is dropped, and log the first of its kind, and at most one line a minute after it."""
        now = self._clock()
        with self._lock:
            self._dropped[refused.kind] += 1
            count = self._dropped[refused.kind]
            logged_at, logged = self._logged.get(refused.kind, (-LOGGED_EVERY, 0))
            if now - logged_at < LOGGED_EVERY:
                return
            self._logged[refused.kind] = now, count
        of, more = f" ({refused.detail})" if refused.detail else "", count - logged - 1
        others = f"; {more} others since the last line about this" if more else ""
        log.error("a message was dropped: %s%s%s", refused.kind, of, others)

    def unwrap(self, item: bytes, most_bytes: int) -> tuple[bytes, dict[str, Any]]:
        """Return the body and the headers of a message on Redis, where kombu wraps both into one JSON object.

        Raises:
            Refused: it is not such an object, or `check` refuses it.
        """
        if len(item) > wrapped_bytes(most_bytes):
            raise Refused(EMPTY)
        body, rest = _without_body(item)
        _check_size(rest, most_bytes)
        wrapped = read_json(rest)
        if not isinstance(wrapped, dict):
            raise Refused(FOREIGN)
        properties, body = wrapped.get("properties"), wrapped.get("body") or body
        if not isinstance(properties, dict) or properties.get("body_encoding") != "base64":
            raise Refused(FOREIGN)
        return self.check(
            _decode_base64(body),
            wrapped.get("headers"),
            content_type=wrapped.get("content-type"),
            content_encoding=wrapped.get("content-encoding"),
            most_bytes=most_bytes,
        )

    def open_reply(self, item: bytes) -> bytes:
        """Return the body of a message in a reply queue, which is all of it. Nodes of version 0.1 wrap it on Redis.

        Raises:
            Refused: it is too large, has too many values, or is wrapped in another way.
        """
        if item.startswith(_BEGINNING):
            return self.unwrap(item, self.most_bytes)[0]
        _check_size(item, self.most_bytes)
        return item

    def check(
        self, body: Any, headers: Any, *, content_type: Any, content_encoding: Any, most_bytes: int
    ) -> tuple[bytes, dict[str, Any]]:
        """Return a body that may be read as JSON, and the headers that are `SHORT`.

        Raises:
            Refused: the body is larger than `most_bytes` or has too many values; it is compressed; or it is not
                declared to be JSON in UTF-8, as all messages of ours are.
        """
        if content_type != "application/json" or content_encoding not in ("utf-8", "UTF-8", None):
            raise Refused(FOREIGN)
        body = bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b""
        _check_size(body, most_bytes)
        if not headers:
            return body, {}
        if not isinstance(headers, Mapping):
            raise Refused(FOREIGN)
        if headers.get("compression"):
            raise Refused(COMPRESSED)
        return body, _short(headers)


class OpenedMessage:
    """A base class for messages of kombu that came through the door: their content is JSON, and nothing else.

    kombu would replace objects that have a `__type__`, and decode what other content types promise.
    """

    body: bytes
    content: Any = None
    """What a consumer has made of it, as its payload from then on."""

    def _decode(self) -> Any:
        return read_json(self.body) if self.content is None else self.content


def wrapped_bytes(body_bytes: int) -> int:
    """Return the size up to which such a body grows on Redis: base64 takes 4 bytes for 3, headers some hundred more."""
    return body_bytes * 4 // 3 + 64 * 1024


def read_json(body: bytes) -> Any:
    """Return a JSON value as it was sent. Of two equal keys the last one counts, whole numbers keep all of their up to
    4,300 digits, and a number that is too large for a float is infinite.

    Raises:
        Refused: it is not JSON in UTF-8 (half a surrogate pair is not), or nested more than 200 levels deep.
    """
    try:
        return from_json(body)
    except ValueError:
        raise Refused(NOT_JSON) from None


def _without_body(item: bytes) -> tuple[Any, bytes]:
    """Return the encoded body and the message without it if it is large and begins as kombu writes it, which saves the
    memory of a copy; else nothing, and all of it."""
    begins = len(_BEGINNING)
    ends = item.find(b'"', begins) if len(item) > LARGE and item.startswith(_BEGINNING) else -1
    if ends < 0:
        return "", item
    return memoryview(item)[begins:ends], item[:begins] + item[ends:]


def _decode_base64(body: Any) -> bytes:
    if not isinstance(body, str | memoryview):
        raise Refused(FOREIGN)
    try:
        return binascii.a2b_base64(body, strict_mode=True)
    except ValueError:
        raise Refused(NOT_JSON) from None


def _check_size(body: bytes, most_bytes: int) -> None:
    if not 0 < len(body) <= most_bytes:
        raise Refused(EMPTY)
    if len(body) > MOST_VALUES and has_more_values(body, MOST_VALUES):
        raise Refused(TOO_MANY_VALUES)


def _short(headers: Mapping[Any, Any]) -> dict[str, Any]:
    short: dict[str, Any] = {}
    for name, value in headers.items():
        is_short = len(value) <= SHORT if isinstance(value, str) else isinstance(value, bool | float)
        if isinstance(value, int):
            is_short = value.bit_length() <= 64
        if is_short and isinstance(name, str) and len(name) <= SHORT and len(short) < MOST_HEADERS:
            short[name] = value
    return short
