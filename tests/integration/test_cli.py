"""The command line as an operator and a shell see it: real processes, a real broker with a password, simulated MLX."""

import json
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from fleet_worker.host.child_process import ChildProcess
from fleet_worker.settings import Settings
from fleet_worker.simulator import Fault, embedding, reply_tokens
from fleet_worker.testing import SimulatedMLX, running_node, worker_toml
from tests.brokers import Valkey, free_port
from tests.commands import fleet_worker

CHAT, EMBED = "sim-chat", "sim-embed"
PASSWORD, API_KEY = "hush-hush-4711", "sk-never-shown-0815"
WITHIN = 20.0
BIN = Path(sys.executable).parent


def rest(*lines):
    """What shows the same in another way."""
    return [pytest.param(line, marks=pytest.mark.rest) for line in lines]


@pytest.fixture(scope="module")
def broker_url():
    """With a user and a password, which no output may show."""
    with Valkey() as broker, redis.Redis.from_url(broker.url) as client:
        client.acl_setuser(
            "operator", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", channels="*", commands=["+@all"]
        )
        yield broker.url.replace("//", f"//operator:{PASSWORD}@")


@pytest.fixture(scope="module")
def mlx():
    """Tokens one by one, so that a reply can be held after some of them."""
    with SimulatedMLX(
        flavour="vllm_batched", models=[CHAT, EMBED], token_interval=0.001, tokens=400, api_key=API_KEY
    ) as server:
        yield server


@pytest.fixture(scope="module")
def node(broker_url, mlx):
    instance = {"base_url": mlx.base_url, "api_key": API_KEY, "limits": {"concurrency": 4}}
    with running_node(broker_url, **instance, models={CHAT: {}, EMBED: {}}) as process:
        yield process


@pytest.fixture(autouse=True)
def environment(broker_url, monkeypatch):
    """What every command here runs with. A test run in the background has SIGINT ignored, and so would they."""
    monkeypatch.setenv("FLEET_BROKER_URL", broker_url)
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Write a FLEET_CONFIG for a worker; instances are given by name."""

    def write(text="", **instances):
        tables = [worker_toml(name, {"api_key": API_KEY, **values}) for name, values in instances.items()]
        path = tmp_path / "worker.toml"
        path.write_text("\n".join([text, *tables]))
        monkeypatch.setenv("FLEET_CONFIG", str(path))

    return write


def command(line):
    """`fleet-worker ...` or `celery ...` of this installation."""
    name, *arguments = shlex.split(line)
    return [str(BIN / name), *arguments]


def run(line):
    """Run a process to its end; whatever it says, it shows no secret and no traceback."""
    done = subprocess.run(command(line), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WITHIN)
    assert_discreet(done.stdout + done.stderr)
    return done


def call(line, given=b""):
    """The same for `fleet-worker`, in this process."""
    done = fleet_worker(line, given)
    assert_discreet(done.stdout + done.stderr)
    return done


def assert_discreet(output):
    assert PASSWORD not in output
    assert API_KEY not in output
    assert "Traceback" not in output


def assert_refused(done, exit_code, *words, begins="fleet-worker: "):
    """One line says why, and nothing is on standard output."""
    assert (done.returncode, done.stdout) == (exit_code, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for word in (begins, *words):
        assert word in lines[0]


def assert_gave_up(done, exit_code, *words, node="local"):
    """The one line is of its log: with the time, and whose it is."""
    assert_refused(done, exit_code, *words, begins=f": CRITICAL/{node}@{Settings().host}] ")
    assert done.stderr.startswith("[2")


def answer(prompt, max_tokens, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    return "".join(reply_tokens([*messages, {"role": "user", "content": prompt}], max_tokens, tokens=400))


def last_chat(mlx):
    return next(request for request in reversed(mlx.requests) if request.path == "/v1/chat/completions").body


@contextmanager
def started(line):
    """A command that is still running; read its `stdout`."""
    process = subprocess.Popen(
        command(line), bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process):
    """What it said after this, all of it decent."""
    stdout, stderr = (text.decode() for text in process.communicate(timeout=WITHIN))
    assert_discreet(stdout + stderr)
    return stdout, stderr


# --- chat and embed -------------------------------------------------------------------------------------------------


def test_an_answer_is_printed_as_it_comes(node, mlx):
    with mlx.held(at_token=5), started(f"fleet-worker chat {CHAT} Hello --max-tokens 40") as process:
        first = process.stdout.read(1).decode()
        assert mlx.counters["running"] == 1  # the server is still at it
        mlx.release()
        rest, _ = ended(process)
    assert process.returncode == 0
    assert first + rest == answer("Hello", 40) + "\n"


def test_an_answer_can_be_had_whole(node):
    done = call(f"chat {CHAT} Hello --max-tokens 10 --no-stream")
    assert (done.returncode, done.stdout, done.stderr) == (0, answer("Hello", 10) + "\n", "")


def test_options_reach_the_server(node, mlx):
    done = call(f"chat {CHAT} Hello --system 'Be brief.' --max-tokens 3 --temperature 0.25 --timeout 15")
    assert done.stdout == answer("Hello", 3, system="Be brief.") + "\n"
    body = last_chat(mlx)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (body["max_tokens"], body["temperature"]) == (3, 0.25)


def test_a_prompt_can_come_from_standard_input(node, mlx):
    prompt = "größer\n東京\u2028 🚢\n"
    assert call(f"chat {CHAT} - --max-tokens 3", given=prompt).stdout == answer(prompt, 3) + "\n"
    assert last_chat(mlx)["messages"] == [{"role": "user", "content": prompt}]


def test_embeddings_are_json_lines_in_the_order_of_the_texts(node):
    done = call(f"embed {EMBED} größer b größer --timeout 15")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["input"] for line in lines] == ["größer", "b", "größer"]
    for line in lines:
        assert line["embedding"] == pytest.approx(embedding(line["input"]), abs=1e-6)


def test_texts_to_embed_can_come_from_standard_input_one_per_line(node):
    done = call(f"embed {EMBED} -", given="one\r\ntwo\u2028still two\nthree")
    lines = [json.loads(line) for line in done.stdout.split("\n") if line]
    assert [line["input"] for line in lines] == ["one", "two\u2028still two", "three"]
    assert lines[2]["embedding"] == pytest.approx(embedding("three"), abs=1e-6)


def test_an_error_of_a_process_is_one_line_and_an_exit_code(monkeypatch):
    """The other tests call the entry point in this process."""
    port = free_port()
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://operator:{PASSWORD}@127.0.0.1:{port}/0")
    monkeypatch.setenv("FLEET_ROUTER__CONNECT_TIMEOUT", "0.5")
    assert_refused(run(f"fleet-worker chat {CHAT} Hello"), 69, f"127.0.0.1:{port}", "FLEET_BROKER_URL")


@pytest.mark.parametrize("line", [f"chat {CHAT} Hello", f"embed {EMBED} a", "status", "drain local@mini", "drain mini"])
def test_a_password_that_the_broker_refuses_is_said_at_once(line, broker_url, monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", broker_url.replace(PASSWORD, f"{PASSWORD}-wrong"))
    monkeypatch.setenv("FLEET_ROUTER__CONNECT_TIMEOUT", "600")
    done = call(line)
    assert_refused(done, 69, "refuses the user or the password: correct them in broker_url (FLEET_BROKER_URL, ")
    assert "running" not in done.stderr


@pytest.mark.parametrize("line", ["chat nobody Hello", *rest("chat --no-stream nobody Hello", "embed nobody Hello")])
def test_a_model_that_nobody_serves_is_said_when_time_is_up(line, node):
    assert_refused(call(f"{line} --timeout 1.5"), 69, "no node took the request", "1.5 s")


def test_the_wait_for_a_node_has_a_limit_of_its_own(node):
    assert_refused(
        call("chat nobody Hello --queue-timeout 0.5"), 69, "no node took the request", "queue_timeout of 0.5 s"
    )


def test_a_request_that_a_server_refuses_has_one_line_too(node, mlx):
    mlx.fail(Fault("status", status=400))
    assert_refused(call(f"chat {CHAT} Hello --timeout 15"), 64, "refused the request (400)")


def test_a_reader_that_leaves_is_no_error_to_talk_about(node, mlx):
    """`fleet-worker chat ... | head -c 1`"""
    with mlx.held(at_token=5), started(f"fleet-worker chat {CHAT} Hello --max-tokens 400") as process:
        assert process.stdout.read(1)
        process.stdout.close()
        mlx.release()
        assert process.stderr.read() == b""
        assert process.wait(WITHIN) == 1
    mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, WITHIN)


def test_ctrl_c_ends_an_answer(node, mlx):
    with mlx.held(at_token=5), started(f"fleet-worker chat {CHAT} Hello --max-tokens 200") as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert ended(process)[1].strip() == ""
    assert process.returncode == 130


# --- worker ---------------------------------------------------------------------------------------------------------

WORKERS = ["fleet-worker worker --instance local", "celery -A fleet_worker worker -n local@%h"]
UNNAMED = ["fleet-worker worker", "celery -A fleet_worker worker"]


@pytest.mark.parametrize("line", [WORKERS[0], *rest("celery -A fleet_worker inspect ping")])
def test_a_configuration_that_is_not_there_is_one_line(line, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEET_CONFIG", str(tmp_path / "nowhere.toml"))
    assert_refused(run(line), 78, "FLEET_CONFIG", "nowhere.toml")


def test_a_wrong_configuration_is_one_line_that_names_the_place(configured):
    configured(f"[instances.local]\napi_keyy = '{API_KEY}'")
    assert_refused(run(WORKERS[1]), 78, "instances.local.api_keyy")


@pytest.mark.parametrize("line", [WORKERS[0], *rest(UNNAMED[1])])
def test_a_host_on_which_no_instance_has_opted_in_serves_nothing(line, configured):
    configured(local={"base_url": "http://127.0.0.1:1", "fleet": {"enabled": True}})
    assert_refused(run(line), 78, "no instance has opted in", "respond_to_requests = true")


@pytest.mark.parametrize("line", [UNNAMED[0], *rest(UNNAMED[1], "celery -A fleet_worker worker -n wrong@%h")])
def test_the_instance_must_be_named_if_it_is_not_clear(line, configured):
    configured(one={"base_url": "http://127.0.0.1:1"}, two={"base_url": "http://127.0.0.1:1"})
    assert_refused(run(line), 78, "-n NAME@%h", "one, two")


def test_a_node_that_cannot_begin_does_not_go_on_as_some_other_worker(configured, monkeypatch):
    monkeypatch.setenv("FLEET_STATE_DIR", "/dev/null/state")
    configured(local={"base_url": "http://127.0.0.1:1"})
    assert_gave_up(run("celery -A fleet_worker worker -n registry@%h"), 78, "state_dir", node="registry")


@pytest.mark.rest
def test_a_server_that_is_down_is_waited_for_and_then_named(configured):
    url = f"http://127.0.0.1:{free_port()}"
    configured("[worker]\nstart_timeout = 1", local={"base_url": url})
    done = run(WORKERS[1])
    waits, gave_up = done.stderr.splitlines()
    assert f": INFO/local@{Settings().host}] waits up to 1 s for an MLX server at {url}" in waits
    done.stderr = gave_up
    assert_gave_up(done, 69, url, "within 1 s")


@pytest.mark.rest
def test_a_server_that_serves_nothing_is_a_matter_of_configuration(configured):
    with SimulatedMLX(flavour="vllm_batched", listed=[], api_key=API_KEY) as empty:
        configured(local={"base_url": empty.base_url})
        assert_gave_up(run(WORKERS[0]), 78, "[instances.local.models]")


@pytest.mark.rest
def test_a_listed_model_that_does_not_do_what_the_instance_is_for_is_named(configured, mlx):
    fleet = {"enabled": True, "respond_to_requests": True, "capabilities": ["chat"]}
    configured(local={"base_url": mlx.base_url, "fleet": fleet, "models": {"bge-talks": {}}})
    assert_gave_up(run(WORKERS[0]), 78, "'bge-talks'", "set features = { completion = true }")


def test_a_server_that_refuses_the_key_is_said_without_the_key(configured):
    with SimulatedMLX(flavour="openai", api_key="another") as strict:
        configured(local={"base_url": strict.base_url})
        assert_gave_up(run(WORKERS[0]), 69, "check api_key")


@pytest.mark.parametrize("line", [UNNAMED[0], *rest(WORKERS[1])])
def test_a_worker_becomes_the_node_of_its_instance(line, mlx, configured):
    """Its name, pool, slots and lanes come from the settings, whichever way it is started."""
    instances = {
        "local": {"base_url": mlx.base_url, "limits": {"concurrency": 3}},
        "idle": {"fleet": {"enabled": False}},
    }
    configured('host = "mini-7"', **instances)
    name = "local@mini-7"
    lanes = [f"chat.{CHAT}", f"stream_chat.{CHAT}", f"embed.{EMBED}", f"node.{name}"]
    with worker(line) as process:
        process.wait_for(f"{name} is ready, 3 slots", WITHIN)
        assert "concurrency: 3 (thread)" in process.output
        for lane in lanes:
            assert process.output.count(f"{name} serves lane llm.fleet.{lane}\n") == 1
        assert process.output.count(" serves lane ") == len(lanes)
        process.signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("-c 9", "limits.concurrency"),
        pytest.param("-Q mine", "leave out -Q", marks=pytest.mark.rest),
        pytest.param("-P solo", "leave out -P", marks=pytest.mark.rest),
    ],
)
def test_what_the_settings_say_is_refused_on_the_command_line(option, said, mlx, configured):
    configured(local={"base_url": mlx.base_url})
    assert_refused(run(f"{WORKERS[0]} {option}"), 78, said)


@pytest.mark.rest
def test_a_debug_log_shows_no_secret(broker_url, mlx, configured):
    configured(local={"base_url": mlx.base_url, "models": {"talkative": {"backend": CHAT}}})
    with worker(f"{WORKERS[0]} --loglevel DEBUG") as process:
        process.wait_for("is ready", WITHIN)
        assert call("chat talkative Hello --max-tokens 2").stdout == answer("Hello", 2) + "\n"
        process.wait_for("succeeded", WITHIN)


@pytest.mark.rest
def test_a_worker_without_its_broker_waits_for_it_and_shows_no_secret(mlx, configured, monkeypatch):
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("FLEET_BROKER_URL", f"redis://operator:{PASSWORD}@{place}/0")
    configured(local={"base_url": mlx.base_url})
    with worker(WORKERS[1]) as process:
        process.wait_for(f"the broker at {place} is away (ConnectionError)", WITHIN)
        process.signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0


@pytest.mark.rest
def test_sigterm_lets_running_work_finish(mlx, configured):
    configured(local={"base_url": mlx.base_url, "models": {"mine": {"backend": CHAT}}})
    with worker(WORKERS[0]) as process:
        process.wait_for("is ready", WITHIN)
        with mlx.held(at_token=5), started("fleet-worker chat mine Hello --max-tokens 100") as chat:
            first = chat.stdout.read(1).decode()
            process.signal(signal.SIGTERM)
            process.wait_for("running requests have", WITHIN)
            mlx.release()
            assert first + ended(chat)[0] == answer("Hello", 100) + "\n"
        assert chat.returncode == 0
        assert process.wait(WITHIN) == 0


@contextmanager
def worker(line):
    process = ChildProcess(line, command(line))
    try:
        yield process
    finally:
        process.stop()
        assert_discreet(process.output)


@pytest.mark.rest
def test_a_server_at_a_usual_port_is_found(configured):
    if in_use(8000) or in_use(8080):
        pytest.skip("something listens at port 8000 or 8080 of this machine")
    configured(local={})
    with SimulatedMLX(flavour="mlx_lm", port=8080, listed=[CHAT]), worker(WORKERS[0]) as process:
        process.wait_for("mlx_lm server at http://127.0.0.1:8080", WITHIN)
        process.wait_for("is ready", WITHIN)


def in_use(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- celery's own commands ------------------------------------------------------------------------------------------


@pytest.mark.rest
def test_celery_commands_need_no_instance_and_show_no_secret(node):
    lines = {
        "celery -A fleet_worker status": "1 node online",
        "celery -A fleet_worker report": "broker_url: 'redis://operator:********@",
        "celery -A fleet_worker inspect conf": "redis://operator:********@",
        "celery -A fleet_worker inspect stats": "celery.concurrency.thread:TaskPool",
    }
    with ThreadPoolExecutor() as pool:  # each of them waits a second for the answers of more nodes
        for done, said in zip(pool.map(run, lines), lines.values(), strict=True):
            assert done.returncode == 0
            assert said in done.stdout
