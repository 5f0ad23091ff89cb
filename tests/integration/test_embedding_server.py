"""The embedding server, with the real model, over HTTP; numbers are checked against NumPy and known values."""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fleet_worker.demo.models import embedding_model, platform_problem
from fleet_worker.host.child_process import ChildProcess, child, free_port, python

pytestmark = [pytest.mark.timeout(300), pytest.mark.rest]  # the first run downloads 84 MB

if platform_problem() and not os.environ.get("CI"):
    pytest.skip(str(platform_problem()), allow_module_level=True)

NAME = "all-minilm-l6-v2"
LONG_TEXT = "word " * 300
SECRET = "xylophonic-zebra-4711"


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedding_model(lambda text, done: None)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[httpx.Client, ChildProcess]]:
    with _running(folder) as client_and_process:
        yield client_and_process


@pytest.fixture
def client(server: tuple[httpx.Client, ChildProcess]) -> httpx.Client:
    return server[0]


def test_similar_sentences_have_the_known_similarities(client: httpx.Client) -> None:
    """These are the figures that other implementations of this model give."""
    eating, bread, happy, very_happy, dog, sunny = _vectors(
        client,
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "That is a happy person",
        "That is a very happy person",
        "That is a happy dog",
        "Today is a sunny day",
    )
    assert eating @ bread == pytest.approx(0.755, abs=0.001)
    assert happy @ very_happy == pytest.approx(0.943, abs=0.001)
    assert happy @ dog == pytest.approx(0.695, abs=0.001)
    assert happy @ sunny == pytest.approx(0.257, abs=0.001)


def test_vectors_equal_those_of_a_plain_numpy_encoder(client: httpx.Client, folder: Path) -> None:
    """A second implementation in float64, written from the paper's formulas, agrees to 1e-5."""
    texts = ["A man is eating food.", "Numbers 1984 and 3.14, ünïcödé 日本 🦊", LONG_TEXT]
    for text, vector in zip(texts, _vectors(client, *texts), strict=True):
        assert np.abs(vector - _reference(folder, text)).max() < 1e-5


def test_vectors_have_the_model_s_length_and_norm_one(client: httpx.Client) -> None:
    """Callers may take the dot product for the cosine."""
    for vector in _vectors(client, "a", "two words", LONG_TEXT):
        assert vector.shape == (384,)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_text_has_the_same_vector_alone_and_in_any_batch(client: httpx.Client) -> None:
    """Padding and sorting by length change neither the vectors nor their order."""
    texts = [f"text {number} " + "and so on " * (number * 7 % 13) for number in range(40)]
    together = _vectors(client, *texts)

    for number in (0, 1, 12, 25, 39):
        alone = _vectors(client, texts[number])[0]
        assert np.abs(alone - together[number]).max() < 1e-4
    assert len({tuple(vector) for vector in together}) == 40


def test_concurrent_requests_get_their_own_vectors(client: httpx.Client) -> None:
    """Requests take turns on the one model thread and are not mixed up."""
    texts = [f"number {number}" for number in range(8)]
    expected = _vectors(client, *texts)
    received: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda t=text: received.update({t: _vectors(client, t)[0]})) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for text, vector in zip(texts, expected, strict=True):
        assert np.abs(received[text] - vector).max() < 1e-4


def test_base64_holds_the_same_float32_values(client: httpx.Client) -> None:
    """The bytes are little-endian whatever the machine."""
    plain = _embed(client, input="Hello").json()["data"][0]["embedding"]
    packed = _embed(client, input="Hello", encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<384f", base64.b64decode(packed)) == tuple(plain)


def test_the_answer_is_shaped_like_that_of_openai(client: httpx.Client) -> None:
    """A string is a list of one, and usage counts tokens without padding."""
    answer = _embed(client, input=["Hello", "Hello there my friend"]).json()
    assert {key: answer[key] for key in ("object", "model", "usage")} == {
        "object": "list",
        "model": NAME,
        "usage": {"prompt_tokens": 3 + 6, "total_tokens": 3 + 6},
    }
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", 0), ("embedding", 1)]


def test_a_long_text_is_cut_at_the_model_s_limit(client: httpx.Client) -> None:
    """What is cut is not counted, and has no influence."""
    answer = _embed(client, input=[LONG_TEXT, LONG_TEXT + "something else"]).json()
    assert answer["usage"]["prompt_tokens"] == 2 * 256
    assert answer["data"][0]["embedding"] == pytest.approx(answer["data"][1]["embedding"], abs=1e-6)


def test_the_served_model_is_listed_and_has_an_alias(client: httpx.Client) -> None:
    """`default_model` is what `mlx_lm.server` calls its own."""
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [NAME]
    assert client.get("/health").json() == {"status": "ok"}
    assert _embed(client, input="a", model="default_model").json()["model"] == NAME


def test_another_model_is_not_found(client: httpx.Client) -> None:
    """Nothing is loaded or guessed."""
    response = _embed(client, input="a", model="bge-large")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "change",
    [
        {"input": []},
        {"input": ""},
        {"input": ["a", ""]},
        {"input": [1, 2, 3]},
        {"input": [[1, 2], [3]]},
        {"input": ["a", None]},
        {"input": None},
        {"input": {"text": "a"}},
        {"input": "\ud800"},
        {"input": ["a"] * 2049},
        {"model": None},
        {"model": 7},
        {"encoding_format": "int8"},
        {"encoding_format": ["float"]},
        {"dimensions": 128},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_an_invalid_request_is_refused(client: httpx.Client, change: dict[str, Any]) -> None:
    """The error has OpenAI's shape and status 400."""
    body = json.dumps({"model": NAME, "input": "a"} | change)
    _assert_refused(client.post("/v1/embeddings", content=body), 400)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe\xfa", b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, body: bytes) -> None:
    """Neither broken JSON nor absurd nesting is an internal error."""
    _assert_refused(client.post("/v1/embeddings", content=body), 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(client: httpx.Client, chunked: bool) -> None:
    """The client reads the answer even though it was still sending."""
    body = b"a" * (20 * 1024 * 1024)
    content = iter([body[:1000], body]) if chunked else body
    _assert_refused(client.post("/v1/embeddings", content=content), 413)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/embeddings", 405)])
def test_an_unknown_route_is_refused_in_the_same_shape(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    """A client parses every error alike."""
    _assert_refused(client.request(method, path), status)


def test_health_answers_and_abandoned_work_ends(client: httpx.Client) -> None:
    """A request for minutes of work blocks neither /health nor, once its client has left, the next request."""
    with httpx.Client(base_url=client.base_url, trust_env=False, timeout=1.5) as impatient:
        thread = threading.Thread(target=lambda: _until_timeout(impatient, input=[LONG_TEXT] * 2048))
        thread.start()
        time.sleep(0.5)  # the work has begun
        started = time.monotonic()
        assert client.get("/health").json() == {"status": "ok"}
        assert time.monotonic() - started < 1
        thread.join()

    started = time.monotonic()
    assert _embed(client, input="next").is_success
    assert time.monotonic() - started < 20


def test_a_reused_connection_is_not_delayed(client: httpx.Client) -> None:
    """TCP_NODELAY is on: without it each answer on a reused connection waits 40 ms for an acknowledgement."""
    with httpx.Client(base_url=client.base_url, trust_env=False) as fresh:
        times = []
        for _ in range(20):
            started = time.monotonic()
            fresh.get("/v1/models")
            times.append(time.monotonic() - started)
    assert min(times[1:]) < 0.02
    assert sorted(times)[10] < 0.035


def test_texts_are_never_logged(server: tuple[httpx.Client, ChildProcess]) -> None:
    """Neither what succeeds nor what is refused leaves a trace of its text, in the log or in the error."""
    client, process = server
    assert _embed(client, input=SECRET).is_success
    for change in ({"input": [SECRET, ""]}, {"input": [SECRET, 1]}, {"input": SECRET + "\ud800"}, {"model": SECRET}):
        response = client.post("/v1/embeddings", content=json.dumps({"model": NAME, "input": "a"} | change))
        assert not response.is_success
        assert SECRET not in response.text
    assert SECRET not in process.output
    assert "Traceback" not in process.output


def test_sigterm_ends_the_server_with_exit_code_zero(folder: Path) -> None:
    """Also with an idle connection open, and its port is free at once."""
    with _running(folder) as (client, process):
        assert _embed(client, input="a").is_success
        started = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - started < 5
        with pytest.raises(httpx.TransportError):
            client.get("/health")


def test_sigterm_ends_a_busy_server_too(folder: Path) -> None:
    """Work that does not end soon is answered with 503, which a client may try elsewhere."""
    with _running(folder) as (client, process):
        statuses: list[int] = []
        body = {"input": [LONG_TEXT] * 2048}
        thread = threading.Thread(target=lambda: statuses.append(_embed(client, **body).status_code))
        thread.start()
        time.sleep(0.5)  # the work has begun
        process.signal(signal.SIGTERM)
        assert process.wait(30) == 0
        thread.join()
    assert statuses == [503]
    assert "Traceback" not in process.output


def test_a_folder_without_a_model_is_an_error_at_start(tmp_path: Path) -> None:
    """One line says so, and the exit code is not zero."""
    result = subprocess.run(_command(tmp_path, 0), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert f"cannot load {tmp_path}" in result.stderr
    assert "Traceback" not in result.stderr


@contextmanager
def _running(folder: Path) -> Iterator[tuple[httpx.Client, ChildProcess]]:
    port = free_port()
    with (
        child("the server", _command(folder, port)) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
    ):
        _wait(lambda: _answers(client))
        yield client, process


def _command(folder: Path, port: int) -> list[str]:
    module = "fleet_worker.demo.embedding_server"
    return python("-m", module, "--model", str(folder), "--name", NAME, "--port", str(port))


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").json() == {"status": "ok"}
    except httpx.TransportError:
        return False


def _wait(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _embed(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": NAME} | body)


def _vectors(client: httpx.Client, *texts: str) -> list[Any]:
    return [np.array(item["embedding"]) for item in _embed(client, input=texts).json()["data"]]


def _until_timeout(client: httpx.Client, **body: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        _embed(client, **body)


def _assert_refused(response: httpx.Response, status: int) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["code"]


def _reference(folder: Path, text: str) -> Any:
    """Return the vector of `text` by BERT's formulas in float64, one text at a time and so without a mask."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = tokenizer.encode(text).ids

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: Any) -> Any:
        return x.reshape(len(ids), 12, 32).transpose(1, 0, 2)

    embeddings = [weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    x = norm(embeddings[0][ids] + embeddings[1][: len(ids)] + embeddings[2][0], "embeddings.LayerNorm")
    for layer in range(6):
        name = f"encoder.layer.{layer}"
        q, k, v = (heads(linear(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value"))
        scores = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(32))
        attended = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(ids), 384)
        x = norm(x + linear(attended, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = linear(x, f"{name}.intermediate.dense")
        gelu = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        x = norm(x + linear(gelu, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)
