"""`/v1/embeddings`: OpenAI's embeddings."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.dialect import EmbedAsked, refused, take_model
from fleet_worker.gateway.dialects.openai_common import problem_body
from fleet_worker.gateway.json_text import compact, quoted
from fleet_worker.protocol.reply import EmbedResponse

__all__ = ["asked", "problem_body"]


def asked(body: dict[str, Any], request_id: str, created: int) -> EmbedAsked:
    body = dict(body)
    model, form = take_model(body), body.pop("encoding_format", None)
    if form not in (None, "float", "base64"):
        raise refused("encoding_format", 'must be "float" or "base64"')
    return EmbedAsked(model, body, EmbeddingWriter(model, as_base64=form == "base64"))


class EmbeddingWriter:
    """Makes the answer to one embedding. Base64 is little-endian float32: the form in which vectors travel anyway."""

    def __init__(self, model: str, *, as_base64: bool) -> None:
        self._model = model
        self._as_base64 = as_base64

    def whole(self, response: EmbedResponse) -> bytes:
        vectors = (
            (f'"{text}"' for text in response.data) if self._as_base64 else (compact(each) for each in response.vectors)
        )
        data = ",".join(
            f'{{"object":"embedding","index":{index},"embedding":{vector}}}' for index, vector in enumerate(vectors)
        )
        tokens = response.usage.prompt_tokens or 0
        usage = f'{{"prompt_tokens":{tokens},"total_tokens":{response.usage.total_tokens or tokens}}}'
        return f'{{"object":"list","data":[{data}],"model":{quoted(self._model)},"usage":{usage}}}'.encode("ascii")
