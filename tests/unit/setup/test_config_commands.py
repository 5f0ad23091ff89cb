"""`fleet-worker config`: the example, the check, and what is in force."""

import json
import time
import tomllib

import pytest

from fleet_worker.settings import Settings
from fleet_worker.setup.config_show import entries
from tests.commands import fleet_worker
from tests.documents import ROOT
from tests.unit.test_cli import assert_refused

SECRETS = ("hush-1", "hush-2", "hush-3", "hush-4", "hush-5", "hush-6")
FULL = """
broker_url = "redis://me:hush-1@broker:6379/0"
host = "mini-7"

[router]
affinity_secret = "hush-2-and-more"

[instances.local]
serve = "mlx_lm.server --model org/qwen --api-key hush-3 --port {port}"
environment = { HF_TOKEN = "hush-4" }
api_key = "hush-5"
limits = { concurrency = 4 }
fleet = { enabled = true, respond_to_requests = true, capabilities = ["chat"] }

[instances.local.models."qwen2.5-7b"]
backend = "default_model"

[instances.other]
mlx_api_base = "http://127.0.0.1:9000"
"""


@pytest.fixture
def file(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding)
        return path

    return write


# --- example


@pytest.mark.parametrize(("line", "name"), [("", "worker"), ("worker", "worker"), ("router", "router")])
def test_the_examples_are_those_of_the_folder_config(line, name):
    done = fleet_worker(f"config example {line}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (ROOT / "config" / f"{name}.toml").read_text("utf-8")


def test_another_example_is_a_wrong_command_line():
    assert fleet_worker("config example mini").returncode == 2


# --- check


def test_a_configuration_that_can_be_used_is_told_with_what_would_run(file):
    path = file(FULL)
    done = fleet_worker(f"config check {path}")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "ok",
        f"file: {path}",
        "broker: redis://me:(set)@broker:6379/0",
        "host: mini-7",
        "node local@mini-7: mlx_lm.server --model org/qwen --api-key (set) --port {port} at http://127.0.0.1:8080; "
        "qwen2.5-7b; chat; 4 at the same time",
    ]
    assert done.stderr.splitlines() == [
        "warning  the instance 'other' is not served: its fleet needs enabled = true and respond_to_requests = true"
    ]


def test_without_a_file_the_configuration_of_commands_is_checked(file, monkeypatch):
    assert "file: none: --config or FLEET_CONFIG names one\n" in fleet_worker("config check").stdout
    assert "nodes: none: fine for a router\n" in fleet_worker("config check").stdout
    monkeypatch.setenv("FLEET_CONFIG", str(file("host = 'mini-8'")))
    monkeypatch.setenv("FLEET_ROUTER__TIMEOUT", "7")
    assert "host: mini-8\n" in fleet_worker("config check").stdout
    assert "variables: FLEET_ROUTER__TIMEOUT\n" in fleet_worker("config check").stdout


def test_all_faults_are_told_each_with_its_place(file, monkeypatch):
    text = """
    hots = "mini"
    [router]
    timeout = "soon"
    [instances.local.limits]
    concurrency = 0
    [instances.local.models.qwen2.5-7b]
    """
    monkeypatch.setenv("FLEET_REGISTRY__METRICS_PORT", "high-port")
    done = fleet_worker(f"config check {file(text)}")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines() == [
        "fault    router.timeout: must be a number",
        "fault    registry.metrics_port: must be a whole number (in the variable FLEET_REGISTRY__METRICS_PORT)",
        "fault    instances.local.limits.concurrency: must be greater than or equal to 1",
        "fault    instances.local.models.qwen2.5-7b: unknown key; a name with a dot needs quotes: "
        '[instances.local.models."qwen2.5-7b"]',
        "fault    hots: unknown key, the nearest that exists is host",
        "warning  the instance 'local' is not served: its fleet needs enabled = true and respond_to_requests = true",
    ]


HIDDEN = {
    "a rule about two settings, beside a fault of another one": (
        "[router]\ntimeout = 900\nmax_timeout = 100\nmax_attempts = 0",
        ["router.max_attempts: must be greater", "router: router.timeout must not exceed router.max_timeout"],
    ),
    "a rule about a setting that is wrong by itself": (
        "[router]\ntimeout = 900\nmax_timeout = 'soon'",
        ["router.max_timeout: must be a number"],
    ),
    "a rule of one instance, beside a fault of another one": (
        "[instances.a]\nlimits.concurrency = 0\n[instances.b]\nmax_memory = '12 GB'",
        ["instances.a.limits.concurrency: must be", "instances.b: max_memory is set, but serve is not"],
    ),
    "a rule about all instances, beside a fault of one": (
        "[instances.a]\nserve = 'x'\nbase_url = 'http://127.0.0.1:80'\nlimits = 1\n"
        "[instances.b]\nserve = 'x'\nbase_url = 'http://127.0.0.1:80'",
        ["instances.a.limits: must be a table", "instances: b has the port of a"],
    ),
    "a rule that needs what is wrong": (
        "[instances.a]\nserve = 5\nmax_memory = '12 GB'\nca = '{pem}'\nbase_url = 'hffp://h'",
        ["instances.a.base_url: must be an http", "instances.a.serve: must be a text"],
    ),
    "what is no table": (
        "instances = 1\nrouter = 'x'\n[gateway]\nhost = '0.0.0.0'",
        ["router: must be a table", "gateway: gateway.host 0.0.0.0 can be reached", "instances: must be a table"],
    ),
    "names that mean something in Python": (
        "self = 1\n_env_file = 'x'\n[hots]\nhost = 'h'\nx = 1",
        ["self: unknown key", "_env_file: unknown key", "hots: unknown key, the nearest that exists is host"],
    ),
    "more than one wrong item of a list": (
        "[instances.a]\nfleet.capabilities = ['x', 'chat', 'y']\nmax_memory = '12 GB'",
        ["instances.a.fleet.capabilities.0: ", "instances.a.fleet.capabilities.2: ", "instances.a: max_memory is set"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), HIDDEN.values(), ids=HIDDEN)
def test_a_fault_is_told_beside_others_and_only_once(text, expected, file, tmp_path):
    (tmp_path / "ca.pem").touch()
    done = fleet_worker(f"config check {file(text.replace('{pem}', str(tmp_path / 'ca.pem')))}")
    faults = [line.removeprefix("fault    ") for line in done.stderr.splitlines() if line.startswith("fault")]
    assert (done.returncode, len(faults)) == (78, len(expected)), done.stderr
    for said in expected:
        assert [each for each in faults if each.startswith(said)], (said, faults)


def test_warnings_are_told_beside_faults(file, monkeypatch):
    """Of an instance with a fault, only what that fault does not make uncertain."""
    text = """
    [router]
    timeout = "soon"
    [instances.a]
    serve = 5
    [instances.b.fleet]
    enabled = "perhaps"
    [instances.c]
    fleet = { enabled = true, respond_to_requests = true, capabilities = [] }
    [instances]
    d = 1
    """
    monkeypatch.setenv("FLEET_BROKER", "redis://:hush-1@h/0")
    monkeypatch.setenv("FLEET_INSTANCES__AA__BASE_URL", "http://h")
    done = fleet_worker(f"config check {file(text)}")
    assert [line for line in done.stderr.splitlines() if line.startswith("warning")] == [
        "warning  the variable FLEET_BROKER is not read, the nearest that exists is FLEET_BROKER_URL",
        "warning  the variable FLEET_INSTANCES__AA__BASE_URL is for an instance 'aa', which is not in the "
        "configuration, the nearest that exists is a",
        "warning  the instance 'a' is not served: its fleet needs enabled = true and respond_to_requests = true",
        "warning  the instance 'c' is not served: its fleet.capabilities name nothing that its usage allows",
    ]


def test_a_variable_that_is_not_json_hides_no_other_fault(file, monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER", "{")
    monkeypatch.setenv("FLEET_HOST", "a b")
    path = file("[router]\ntimeout = 0\n")
    done = fleet_worker(f"config check {path}")
    assert done.stderr.splitlines() == [
        "fault    the variable FLEET_ROUTER, or one whose name begins so, is not JSON",
        "fault    host: a host is named with letters, digits, '-', '.' and '_' only (in the variable FLEET_HOST)",
        "fault    router.timeout: must be greater than 0",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = ", "is not valid TOML: Invalid value (at end of document)"),
        ("[a]\nb = 1\n[a]", "(at line 3, column 3)"),
    ],
)
def test_what_is_no_toml_is_a_fault(text, said, file):
    done = fleet_worker(f"config check {file(text)}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
    assert done.stderr.startswith("fault    the file ")
    assert said in done.stderr


def test_a_variable_that_is_not_json_is_a_fault(monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER", "{")
    done = fleet_worker("config check")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
    assert done.stderr.startswith("fault    the variable FLEET_ROUTER, or one whose name begins so, is not JSON")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert_refused(
        fleet_worker(f"config check {tmp_path / 'no.toml'}"), 78, "no.toml of --config or FLEET_CONFIG cannot"
    )


def test_a_file_with_a_byte_order_mark_is_read(file):
    path = file("host = 'mini-7'", "utf-8-sig")
    assert "host: mini-7\n" in fleet_worker(f"config check {path}").stdout


def test_a_mistyped_variable_is_a_warning(monkeypatch):
    monkeypatch.setenv("FLEET_BROKER", "redis://:hush-1@h/0")
    done = fleet_worker("config check")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "ok")
    assert done.stderr.startswith("warning  the variable FLEET_BROKER is not read, the nearest that exists is FLEET_")


# --- show


def shown(line=""):
    return json.loads(fleet_worker(f"config show --json {line}").stdout)["settings"]


def test_each_value_is_shown_with_its_source(file, monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER__TIMEOUT", "7")
    monkeypatch.setenv("fleet_worker__canary", "false")
    monkeypatch.setenv("FLEET_REGISTRY", '{"metrics_port": 9808}')
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__PROMPT_CACHE_SIZE", "3")
    found = shown(f"--config {file(FULL)}")
    assert {
        name: tuple(found[name].values())
        for name in (
            "host",
            "router.timeout",
            "worker.canary",
            "registry.metrics_port",
            "registry.models_interval",
            "router.max_wait",
            "instances.local.prompt_cache_size",
            "instances.local.limits.concurrency",
            "instances.local.limits.embed_batch",
            'instances.local.models."qwen2.5-7b".backend',
            "instances.other.base_url",
        )
    } == {
        "host": ("mini-7", "mine.toml"),
        "router.timeout": (7.0, "FLEET_ROUTER__TIMEOUT"),
        "worker.canary": (False, "fleet_worker__canary"),
        "registry.metrics_port": (9808, "FLEET_REGISTRY"),
        "registry.models_interval": (60.0, "default"),
        "router.max_wait": (None, "default"),
        "instances.local.prompt_cache_size": (3, "FLEET_INSTANCES__LOCAL__PROMPT_CACHE_SIZE"),
        "instances.local.limits.concurrency": (4, "mine.toml"),
        "instances.local.limits.embed_batch": (64, "default"),
        'instances.local.models."qwen2.5-7b".backend': ("default_model", "mine.toml"),
        "instances.other.base_url": ("http://127.0.0.1:9000", "mine.toml"),
    }


@pytest.mark.parametrize("form", ["", "--json"])
def test_no_secret_is_shown(form, file, monkeypatch):
    monkeypatch.setenv("FLEET_INSTANCES__OTHER__API_KEY", "hush-6")
    done = fleet_worker(f"config show {form} --config {file(FULL)}")
    assert done.returncode == 0
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
    assert done.stdout.count("(set)") == 6


def test_what_is_shown_is_a_file_with_the_same_settings(file, monkeypatch, tmp_path):
    """What is secret apart."""
    harmless = FULL.replace(":hush-1", "").replace('\napi_key = "hush-5"', "").replace(" --api-key hush-3", "")
    harmless = harmless.replace('environment = { HF_TOKEN = "hush-4" }', "max_memory = '12 GB'")
    monkeypatch.setenv("FLEET_CONFIG", str(file(harmless.replace('affinity_secret = "hush-2-and-more"', ""))))
    monkeypatch.setenv("FLEET_FEATURES", '{"a b": true}')
    before = Settings()
    pasted = tmp_path / "pasted.toml"
    pasted.write_text(fleet_worker("config show").stdout)
    monkeypatch.delenv("FLEET_FEATURES")
    monkeypatch.setenv("FLEET_CONFIG", str(pasted))
    assert Settings() == before
    assert tomllib.loads(pasted.read_text())["features"] == {"a b": True}


def test_the_line_of_a_setting_ends_with_its_source(file):
    lines = fleet_worker(f"config show --config {file(FULL)}").stdout.splitlines()
    assert 'host = "mini-7"  # mine.toml' in lines
    assert "timeout = 300.0  # default" in lines
    assert "# max_wait is not set" in lines
    assert '[instances.local.models."qwen2.5-7b"]' in lines


@pytest.mark.rest
def test_the_work_grows_with_the_number_of_settings_and_not_faster(monkeypatch):
    def seconds(number):
        for each in range(number):
            monkeypatch.setenv(f"FLEET_INSTANCES__I{each}__BASE_URL", f"http://127.0.0.1:{9000 + each}")
        settings = Settings()
        begun = time.process_time()
        entries(settings)
        return time.process_time() - begun

    few, many = (min(seconds(number) for _ in range(3)) for number in (100, 800))
    assert many < 24 * few  # 8 times as many; 64 if each was compared with all others
