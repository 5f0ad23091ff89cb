"""Complete responses of the simulated servers, mostly errors."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response: everything that is not a stream."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def answer(status: int, value: object) -> Answer:
    """A JSON answer."""
    return Answer(status, json.dumps(value, ensure_ascii=False).encode())


def crashed(_: object = None) -> Answer:
    """The response of uvicorn when a handler raised."""
    return Answer(500, b"Internal Server Error", "text/plain; charset=utf-8")


def unprocessable(field: str, message: str) -> Answer:
    """FastAPI's response to a body that is not valid."""
    return answer(422, {"detail": [{"type": "value_error", "loc": ["body", field], "msg": message}]})


def openai_error(status: int, message: str) -> Answer:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return answer(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})


def mlx_openai_error(status: int, message: str) -> Answer:
    error = {"message": message, "type": "internal_error", "param": None, "code": str(status)}
    return answer(status, {"error": error})


def mlx_openai_unknown(model: str) -> Answer:
    error = {"message": f"Model '{model}' not found. Available models: (none)", "type": "model_not_found", "code": 404}
    return answer(404, {"detail": {"error": error}})


def rapid_unknown(model: str) -> Answer:
    error = {"message": f"The model `{model}` does not exist.", "type": "not_found_error", "code": "model_not_found"}
    return answer(404, {"error": {**error, "param": "model"}})
