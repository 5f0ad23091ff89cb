"""A small OpenAI-compatible embeddings server on MLX; `mlx_lm.server` has no embeddings.

    python -m fleet_worker.demo.embedding_server --model FOLDER --name all-minilm-l6-v2 --port 8081

It serves one BERT sentence encoder with mean pooling: `POST /v1/embeddings`, `GET /v1/models`, `GET /health`.
The port opens when the model is loaded. Texts are never logged, and never part of an error.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import logging
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import uvicorn
from mlx import nn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger(__name__)

MAX_BODY = 8 * 1024 * 1024
MAX_INPUTS = 2048
TOKENS_A_PASS = 512
"""Padded tokens in one forward pass. It cannot be interrupted, and takes some 2 s on a slow CPU."""
KEEP_ALIVE_SECONDS = 75
DRAIN_SECONDS = 3


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # After its shutdown uvicorn raises the signal again, which by default ends the process with an error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with _mlx_thread() as thread:
        try:
            encoder = thread.submit(Encoder, arguments.model).result()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            sys.exit(f"cannot load {arguments.model} as a BERT sentence encoder: {error!r}")
        logger.info("embedding_model_loaded name=%s dimensions=%d", arguments.name, encoder.dimensions)
        uvicorn.run(
            create_app(encoder, arguments.name, thread),
            host=arguments.host,
            port=arguments.port,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fleet_worker.demo.embedding_server", description="Serve a sentence encoder on MLX."
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a BERT sentence encoder")
    parser.add_argument("--name", required=True, help="the model name to serve it under")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8081)
    return parser.parse_args()


@contextmanager
def _mlx_thread() -> Iterator[ThreadPoolExecutor]:
    """Yield the one thread that loads and runs the model: MLX binds a computation to the thread that began it."""
    with ThreadPoolExecutor(1, "mlx") as thread:
        try:
            yield thread
        finally:
            thread.submit(mx.clear_streams)  # without it the end of the thread sometimes aborts the process


def create_app(encoder: Encoder, name: str, thread: ThreadPoolExecutor) -> Starlette:
    """Return the ASGI application that serves `encoder` as `name`, running it only in `thread`."""
    service = _Service(encoder, name, thread)
    routes = [
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/health", service.health),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _error, ClientDisconnect: _client_has_left})


@dataclass(frozen=True)
class _Service:
    encoder: Encoder
    name: str
    thread: ThreadPoolExecutor

    async def embeddings(self, request: Request) -> Response:
        wanted = _parse(await _body(request), self.name, self.encoder.dimensions)
        tokens = await self._run(self.encoder.tokenize, wanted.texts)
        vectors = await self._encode(tokens, request)
        data = [
            {"object": "embedding", "index": index, "embedding": _as_base64(vector) if wanted.base64 else vector}
            for index, vector in enumerate(vectors)
        ]
        count = sum(map(len, tokens))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def _encode(self, tokens: list[list[int]], request: Request) -> list[list[float]]:
        """Encode pass by pass, so that requests take turns, and one whose client has left ends."""
        vectors: list[list[float]] = [[] for _ in tokens]
        for batch in _batches(tokens):
            if await request.is_disconnected():
                raise ClientDisconnect
            encoded = await self._run(self.encoder.encode, [tokens[index] for index in batch])
            for index, vector in zip(batch, encoded, strict=True):
                vectors[index] = vector
        return vectors

    async def _run(self, function: Callable[[T], R], argument: T) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, function, argument)
        except asyncio.CancelledError:  # by uvicorn, DRAIN_SECONDS after SIGTERM
            raise _Refused(503, "the server is shutting down", "shutting_down") from None
        # Its text could quote the input, so it is neither logged nor sent to the client.
        except Exception as error:
            logger.error("embedding_failed step=%s error_class=%s", function.__name__, type(error).__name__)
            raise _Refused(500, "the model failed on this input", "internal_error") from None

    async def models(self, _: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "fleet-worker"}]}
        )

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})


class _Refused(HTTPException):
    """The request is answered with an error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(status, message)
        self.code = code


async def _error(_: Request, error: Exception) -> Response:
    status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
    code = error.code if isinstance(error, _Refused) else "not_found" if status == 404 else "invalid_request"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


async def _client_has_left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _body(request: Request) -> bytes:
    """Return the body. A body that is too large is read to its end, or the client might not read the answer."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY:
            chunks.append(chunk)
    if size > MAX_BODY:
        raise _Refused(413, f"the request body is larger than {MAX_BODY} bytes", "request_too_large")
    return b"".join(chunks)


@dataclass(frozen=True)
class _Wanted:
    """The parts of a valid request."""

    texts: list[str]
    base64: bool


def _parse(body: bytes, name: str, dimensions: int) -> _Wanted:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise _invalid("the request body is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        raise _invalid("the request must be an object with a model name")
    if request["model"] not in (name, "default_model"):
        raise _Refused(404, f"this server serves only the model {name}", "model_not_found")
    if request.get("encoding_format") not in (None, "float", "base64"):
        raise _invalid("encoding_format must be float or base64")
    if request.get("dimensions") not in (None, dimensions):
        raise _invalid(f"dimensions must be {dimensions} or left out")
    return _Wanted(_texts(request.get("input")), request.get("encoding_format") == "base64")


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _invalid("input must be a string or a list of strings; token arrays are not supported")
    if not 0 < len(texts) <= MAX_INPUTS:
        raise _invalid(f"input must hold from 1 to {MAX_INPUTS} texts")
    if not all(texts):
        raise _invalid("input must not hold an empty text")
    if not all(map(_is_unicode, texts)):
        raise _invalid("input must not hold half of a surrogate pair")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _invalid(message: str) -> _Refused:
    return _Refused(400, message, "invalid_request")


def _batches(tokens: list[list[int]]) -> Iterator[list[int]]:
    """Yield the indices of all texts in batches for one pass each, texts of similar length together."""
    batch: list[int] = []
    for index in sorted(range(len(tokens)), key=lambda index: len(tokens[index])):
        if batch and (len(batch) + 1) * len(tokens[index]) > TOKENS_A_PASS:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class Encoder:
    """A BERT sentence encoder: token ids to unit vectors. Only for the thread that created it."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        if (config["model_type"], config["hidden_act"]) != ("bert", "gelu") or not pooling["pooling_mode_mean_tokens"]:
            raise ValueError("only BERT with GELU and mean pooling is supported")
        self.dimensions: int = config["hidden_size"]
        self._layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._epsilon: float = config["layer_norm_eps"]
        self._weights = _weights(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()  # done for each pass
        self._tokenizer.enable_truncation(
            json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        )

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, begin and end markers included, cut at the model's limit."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def encode(self, batch: list[list[int]]) -> list[list[float]]:
        """Return one vector of norm 1 for each text, in one forward pass."""
        length = max(map(len, batch))
        ids = mx.array([row + [0] * (length - len(row)) for row in batch])
        mask = mx.arange(length) < mx.array([[len(row)] for row in batch])
        hidden = self._embed(ids)
        for layer in range(self._layers):
            hidden = self._layer(hidden, mask, f"encoder.layer.{layer}")
        summed = (hidden * mask[..., None]).sum(axis=1)  # the mean has the same direction
        vectors: Any = summed / mx.linalg.norm(summed, axis=-1, keepdims=True)
        encoded: list[list[float]] = vectors.tolist()
        return encoded

    def _embed(self, ids: mx.array) -> mx.array:
        words = self._weights["embeddings.word_embeddings.weight"][ids]
        positions = self._weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        types = self._weights["embeddings.token_type_embeddings.weight"][0]
        return self._norm(words + positions + types, "embeddings.LayerNorm")

    def _layer(self, hidden: mx.array, mask: mx.array, name: str) -> mx.array:
        attended = self._linear(self._attend(hidden, mask, f"{name}.attention.self"), f"{name}.attention.output.dense")
        hidden = self._norm(hidden + attended, f"{name}.attention.output.LayerNorm")
        inner = nn.gelu(self._linear(hidden, f"{name}.intermediate.dense"))
        return self._norm(hidden + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _attend(self, hidden: mx.array, mask: mx.array, name: str) -> mx.array:
        texts, length, width = hidden.shape
        size = width // self._heads
        queries, keys, values = (
            self._linear(hidden, f"{name}.{part}").reshape(texts, length, self._heads, size).swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        attended = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=size**-0.5, mask=mask[:, None, None, :]
        )
        return attended.swapaxes(1, 2).reshape(texts, length, width)

    def _linear(self, hidden: mx.array, name: str) -> mx.array:
        return mx.addmm(self._weights[f"{name}.bias"], hidden, self._weights[f"{name}.weight"])

    def _norm(self, hidden: mx.array, name: str) -> mx.array:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return mx.fast.layer_norm(hidden, weight, bias, self._epsilon)


def _weights(path: Path) -> dict[str, mx.array]:
    """Load the weights, with the matrices transposed: multiplying by a transposed view is half as fast on a CPU."""
    loaded: Any = mx.load(str(path))
    weights = {
        name: mx.contiguous(weight.T) if name.startswith("encoder.") and weight.ndim == 2 else weight
        for name, weight in loaded.items()
    }
    mx.eval(weights)
    return weights


if __name__ == "__main__":
    main()
