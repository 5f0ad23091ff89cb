"""What is proposed for a host, from its servers and its models."""

import pytest

from fleet_worker.setup import instances as module
from fleet_worker.setup.instances import found_instances, public_name
from fleet_worker.setup.local_models import LocalModel
from fleet_worker.setup.local_servers import LocalServer
from fleet_worker.setup.worker_file import WorkerFile

URL = "http://127.0.0.1:8080"
MEMORY = 16 * 10**9
QWEN = "mlx-community/Qwen3-14B-4bit"
LOADED = {"qwen3-14b-4bit": {"backend": "default_model", "chat_template": QWEN}}
CHATS = ("chat", "stream_chat")


def model(name, size, kind="chat"):
    return LocalModel(name, kind, size)


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(module, "has_program", lambda: True)


def test_mlx_lm_serves_what_it_was_started_with_not_what_it_lists():
    (found,) = found_instances([LocalServer(URL, "mlx_lm", ("a", "b"), QWEN)], [], MEMORY).values()
    assert (found.base_url, found.serve, found.models) == (URL, None, LOADED)
    assert (found.capabilities, found.concurrency) == (CHATS, 4)


@pytest.mark.parametrize(("taken", "url"), [(False, None), (True, "http://127.0.0.1:8081")])
def test_a_managed_server_gets_another_port_if_its_own_is_taken(taken, url, monkeypatch):
    monkeypatch.setattr("fleet_worker.setup.first_host.is_taken", lambda host, port: taken and port == 8080)
    made = module.with_free_port(module.serving(QWEN))
    assert made.base_url == url
    assert "whose server fleet-worker up starts" in module.described(made)
    text = WorkerFile("redis://broker/0", instances={"local": made}).text()
    assert ("runs already" in text, "8081" in text) == (False, taken)


def test_without_its_command_line_the_model_of_mlx_lm_has_to_be_named():
    server = LocalServer(URL, "mlx_lm", ("a", "b"))
    assert found_instances([server], [model(QWEN, 10**9)], MEMORY) == {}
    (found,) = found_instances([server], [], MEMORY, model=QWEN).values()
    assert found.models == LOADED
    (found,) = found_instances([LocalServer(URL, "mlx_lm", (QWEN,))], [], MEMORY).values()
    assert found.models == {"qwen3-14b-4bit": {"backend": "default_model"}}


def test_another_server_serves_what_it_lists():
    (found,) = found_instances([LocalServer(URL, "vllm_mlx", (QWEN, "/models/My Llama"))], [], MEMORY).values()
    assert found.models == {"qwen3-14b-4bit": {"backend": QWEN}, "my llama": {"backend": "/models/My Llama"}}


@pytest.mark.parametrize(
    ("server", "slots"),
    [
        (LocalServer(URL, "vllm_mlx", ("a",)), 4),
        (LocalServer(URL, "vllm_mlx", ("a",), one_at_a_time=True), 1),
        (LocalServer(URL, "openai", ("a",)), 1),
    ],
)
def test_a_server_gets_as_many_requests_as_it_can_run(server, slots):
    assert [each.concurrency for each in found_instances([server], [], MEMORY).values()] == [slots]


def test_instances_are_named_by_what_they_do():
    servers = [LocalServer(f"{URL}{n}", "vllm_mlx", (name,)) for n, name in enumerate(("a", "bge-m3", "b", "e5"))]
    found = found_instances([*servers, LocalServer(URL, "vllm_mlx", ("c", "minilm"))], [], MEMORY)
    assert {name: each.capabilities for name, each in found.items()} == {
        "local": CHATS,
        "embed": ("embed",),
        "local-2": CHATS,
        "embed-2": ("embed",),
        "local-3": (*CHATS, "embed"),
    }


@pytest.mark.parametrize("models", [(), tuple(f"m{n}" for n in range(21))])
def test_a_server_that_lists_nothing_or_a_catalogue_is_left_out(models):
    assert found_instances([LocalServer(URL, "vllm_mlx", models)], [model(QWEN, 10**9)], MEMORY) == {}


def test_without_a_server_the_largest_model_that_fits_is_served():
    models = [model("org/large", 60 * 10**9), model(QWEN, 8 * 10**9), model("org/small", 10**9)]
    found = found_instances([], models, MEMORY)
    assert found["local"].serve == f"mlx_lm.server --model {QWEN} --port {{port}}"
    assert (found["local"].base_url, found["local"].models) == (None, LOADED)


def test_a_model_that_is_named_is_served_instead():
    found = found_instances([], [model(QWEN, 8 * 10**9)], MEMORY, model="/My Models/qwen")
    assert found["local"].serve == "mlx_lm.server --model '/My Models/qwen' --port {port}"


def test_nothing_is_proposed_where_nothing_can_serve_it(monkeypatch):
    assert found_instances([], [model(QWEN, 60 * 10**9), model("bge", 10, "embedding")], MEMORY) == {}
    monkeypatch.setattr(module, "has_program", lambda: False)
    assert found_instances([], [model(QWEN, 10**9)], MEMORY) == {}


@pytest.mark.parametrize(
    ("backend", "name"), [(QWEN, "qwen3-14b-4bit"), ("/a/b.C/", "b.c"), ("gemma3:4b", "gemma3:4b"), ("/", "/")]
)
def test_the_public_name_is_the_last_part(backend, name):
    assert public_name(backend) == name
