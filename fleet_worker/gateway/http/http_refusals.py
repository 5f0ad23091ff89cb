"""The last answer to a client that is disconnected before the application sees its request."""

from __future__ import annotations

import http

from fleet_worker.gateway.dialects.openai_common import problem_body
from fleet_worker.gateway.http.response import JSON, always
from fleet_worker.gateway.problems import Problem

MOST_HEADERS = 128
MOST_HEAD_BYTES = 64 * 1024
"""Bytes of the path and all headers; and of what surrounds a body that comes in chunks, beside as much as it has."""
MOST_PIPELINED = 16
"""Requests that a client may send before the first one is answered."""
HEAD_WITHIN = 15.0
"""Seconds from the first byte of a request to the end of its headers."""

INVALID = Problem(status=400, code="invalid_http", message="this is no valid HTTP request")
HOST = Problem(status=400, code="invalid_http", message="a request must have one host header")
VERSION = Problem(status=505, code="invalid_http", message="only HTTP/1.1 and HTTP/1.0 are spoken here")
CODING = Problem(status=501, code="invalid_http", message="transfer-encoding: only chunked is known")
PIPELINED = Problem(
    status=400,
    code="invalid_http",
    message=f"at most {MOST_PIPELINED} small requests may be sent before the first one is answered",
)
SLOW = Problem(status=408, code="timeout", message=f"the headers did not arrive within {HEAD_WITHIN:g} s")
TOO_LARGE = Problem(
    status=431,
    code="headers_too_large",
    message=f"the headers are larger than {MOST_HEAD_BYTES:,} bytes, or more than {MOST_HEADERS}",
)


def answer(problem: Problem, request_id: str) -> bytes:
    """Return the bytes of the last answer on a connection."""
    body = problem_body(problem, request_id)
    headers = [
        *always(request_id),
        (b"content-type", JSON),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    first = f"HTTP/1.1 {problem.status} {http.HTTPStatus(problem.status).phrase}\r\n".encode("ascii")
    return first + b"".join(b"%b: %b\r\n" % header for header in headers) + b"\r\n" + body
