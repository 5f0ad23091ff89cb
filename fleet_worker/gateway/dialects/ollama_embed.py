"""`/api/embed`: Ollama's embeddings of one text or more."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import EmbedAsked
from fleet_worker.gateway.dialects.ollama_answer import nanoseconds, problem_body
from fleet_worker.gateway.dialects.ollama_request import WAYS_OUT, EmbedRequest
from fleet_worker.gateway.json_text import compact, quoted
from fleet_worker.protocol.reply import EmbedResponse

__all__ = ["asked", "problem_body"]


def asked(body: dict[str, Any], request_id: str, created: int) -> EmbedAsked:
    given = read(EmbedRequest, body, WAYS_OUT)
    dimensions = {"dimensions": given.dimensions} if given.dimensions is not None else {}
    return EmbedAsked(given.model, {"input": given.input, **dimensions}, EmbedWriter(given.model))


class EmbedWriter:
    """Makes the answer to one request."""

    def __init__(self, model: str) -> None:
        self._model = model

    def whole(self, response: EmbedResponse) -> bytes:
        vectors = ",".join(map(compact, response.vectors))
        timings = {
            "total_duration": nanoseconds(response.timings.queue_wait + response.timings.duration),
            "load_duration": nanoseconds(response.timings.queue_wait),
            "prompt_eval_count": response.usage.prompt_tokens or 0,
        }
        return f'{{"model":{quoted(self._model)},"embeddings":[{vectors}],{compact(timings)[1:]}'.encode("ascii")
