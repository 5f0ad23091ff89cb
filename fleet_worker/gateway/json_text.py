"""JSON made by splicing texts into prepared parts: for what is written once a token."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

__all__ = ["compact", "quoted", "server_sent"]

# `quoted` escapes all that is not ASCII: so half characters do no harm, nor line ends of Unicode, at which
# some clients split a stream of events.


_encoder = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for each value


def compact(value: Any) -> str:
    """Return JSON without spaces."""
    return _encoder.encode(value)


def server_sent(value: Any, event: str = "") -> bytes:
    """Return one server-sent event with this value as JSON."""
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {compact(value)}\n\n".encode("ascii")
