"""`/api/embeddings`: how Ollama's older clients ask for the embedding of one text."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import EmbedAsked
from fleet_worker.gateway.dialects.ollama_answer import problem_body
from fleet_worker.gateway.dialects.ollama_request import WAYS_OUT, EmbeddingsRequest
from fleet_worker.gateway.json_text import compact
from fleet_worker.protocol.reply import EmbedResponse

__all__ = ["asked", "problem_body"]


def asked(body: dict[str, Any], request_id: str, created: int) -> EmbedAsked:
    given = read(EmbeddingsRequest, body, WAYS_OUT)
    return EmbedAsked(given.model, {"input": given.prompt}, _Writer())


class _Writer:
    def whole(self, response: EmbedResponse) -> bytes:
        return compact({"embedding": response.vectors[0]}).encode("ascii")
