"""Which MLX servers are found on this host, and what is not taken for one."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fleet_worker.setup import local_servers as module
from fleet_worker.setup.local_servers import LocalServer, local_servers
from fleet_worker.testing import SimulatedMLX
from tests.brokers import free_port
from tests.mlx_clients import KINDS, took_less_than

MODELS = {"object": "list", "data": [{"id": "gemma3:4b", "object": "model"}]}


def port_of(url):
    return int(url.rpartition(":")[2])


@contextmanager
def web_server(answers, *, protocol="HTTP/1.1", server="Werkzeug/3", other=(404, b"<h1>Not Found</h1>")):
    """Another program: the status and the body of some paths, and of all others."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol
        server_version = server

        def do_GET(self):
            status, body = answers.get(self.path, other)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("flavour", KINDS)
def test_every_kind_of_server_is_found_with_its_models(flavour):
    with SimulatedMLX(flavour=flavour, models=["sim-chat"], listed=["sim-chat", "sim-embed"]) as mlx:
        found = local_servers([port_of(mlx.base_url)])
    kind = KINDS[flavour] if flavour != "omni" else "openai"
    single = flavour == "vllm_simple"
    assert found == [LocalServer(mlx.base_url, kind, found[0].models, one_at_a_time=single)]
    assert "sim-chat" in found[0].models


def test_all_are_found_at_once_in_the_order_of_the_ports():
    with SimulatedMLX(flavour="vllm_batched") as first, SimulatedMLX() as second:
        found = local_servers([port_of(second.base_url), free_port(), port_of(first.base_url)])
    assert [(each.url, each.kind) for each in found] == [(second.base_url, "mlx_lm"), (first.base_url, "vllm_mlx")]


def test_a_server_that_wants_a_key_is_found_without_models():
    with SimulatedMLX(flavour="vllm_batched", api_key="sk-1") as mlx:
        assert local_servers([port_of(mlx.base_url)]) == [LocalServer(mlx.base_url, "vllm_mlx", wants_key=True)]


OTHERS = {
    "the gateway of a fleet": {
        "answers": {"/v1/models": (200, {"data": [{"id": "qwen3-14b", "object": "model", "owned_by": "fleet"}]})},
        "other": (200, {"status": "ready"}),
    },
    "a web page": {},
    "a page for each path": {"other": (200, b"<html>")},
    "an API in JSON": {"other": (404, {"detail": "Not Found"})},
    "an API that is well": {"answers": {"/health": (200, {"status": "ok"})}, "other": (404, {"detail": "Not Found"})},
    "a page that wants a password": {"other": (401, {"error": "unauthorized"})},
    "nothing for each path": {"other": (200, b"")},
    "JSON for each path": {"other": (200, {"error": "Unexpected endpoint or method."})},
    "a list of no models": {"answers": {"/v1/models": (200, {"object": "list", "data": []})}},
    "a script of Python": {"protocol": "HTTP/1.0", "server": "BaseHTTP/0.6"},
}


@pytest.mark.parametrize("answers", OTHERS.values(), ids=OTHERS)
def test_another_program_is_not_taken_for_a_server(answers):
    with web_server(answers.get("answers", {}), **{k: v for k, v in answers.items() if k != "answers"}) as port:
        assert local_servers([port]) == []


@pytest.mark.parametrize(
    "health", [(200, b"Ollama is running"), (404, b"404 page not found"), (200, {"error": "Unexpected endpoint"})]
)
def test_a_server_that_is_only_like_openai_is_found_by_its_models(health):
    """Ollama and LM Studio have no /health."""
    with web_server({"/v1/models": (200, MODELS), "/health": health}) as port:
        (found,) = local_servers([port])
    assert (found.kind, found.models) == ("openai", ("gemma3:4b",))


def test_what_never_answers_takes_no_longer_than_it_may():
    with socket.create_server(("127.0.0.1", 0)) as silent, took_less_than(2):
        assert local_servers([silent.getsockname()[1]], within=0.2) == []


@pytest.mark.parametrize(
    ("words", "port", "model"),
    [
        (["python", "-m", "mlx_lm.server", "--model", "org/a"], 8080, "org/a"),
        (["python3", "/opt/bin/mlx_lm.server", "--model=org/b", "--port=8081"], 8081, "org/b"),
        (["python", "-m", "mlx_lm", "server", "--port", "8082", "--model", "/models/c d"], 8082, "/models/c d"),
        (["python", "-m", "mlx_lm.server"], 8080, ""),
        (["python", "-m", "mlx_lm.server", "--model", "org/a", "--port", "9000"], 8080, ""),
        (["python", "-m", "vllm_mlx", "--model", "org/a", "--port", "8080"], 8080, ""),
        (["mlx_lm.server", "--model"], 8080, ""),
        (None, 8080, ""),
    ],
)
def test_the_model_of_mlx_lm_stands_in_its_command_line(words, port, model, monkeypatch):
    class Process:
        info = {"cmdline": words}  # noqa: RUF012

    monkeypatch.setattr(module.psutil, "process_iter", lambda names: [Process()])
    assert module._model_of(f"http://127.0.0.1:{port}") == model
