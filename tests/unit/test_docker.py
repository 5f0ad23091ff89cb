"""The files in docker/, as far as they can be checked without an engine."""

import contextlib
import importlib.util
import os
import re
import shutil
import ssl
import subprocess
from importlib.metadata import entry_points

import pytest
from flower.options import options

from fleet_worker.settings import Settings
from tests import documents
from tests.flower import ROOT, composed_commands, composed_options

DOCKER = ROOT / "docker"
COMPOSE = (DOCKER / "compose.yaml").read_text("utf-8")
DOCKERFILE = (DOCKER / "Dockerfile").read_text("utf-8")
EXAMPLE = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text("utf-8"), re.MULTILINE))


def test_every_service_has_a_command_that_the_check_below_can_read():
    assert len(composed_commands()) == len(re.findall(r"command:", COMPOSE)) == 4


def test_every_command_starts_a_program_that_is_installed_in_its_image():
    ours = {script.name for script in entry_points(group="console_scripts")}
    broker, *fleet = composed_commands()
    assert broker[0] == "valkey-server"
    assert {command[0] for command in fleet} <= ours & {"celery", "fleet-worker"}


def test_the_certificates_of_the_manual_can_be_made_and_prove_who_a_broker_is(tmp_path):
    (code,) = (code for code in documents.snippets((DOCKER / "README.md").read_text("utf-8"), "sh") if "-x509" in code)
    code = code.replace("broker.example", "localhost")
    subprocess.run(["/bin/sh", "-ec", code], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "broker.pem", tmp_path / "broker.key")
    server.load_verify_locations(tmp_path / "ca.pem")
    server.verify_mode = ssl.CERT_REQUIRED
    files = {"broker_ca": "ca.pem", "broker_cert": "client.pem", "broker_key": "client.key"}
    tls = Settings(broker_url="rediss://h", **{name: tmp_path / file for name, file in files.items()}).broker_tls
    client = tls.context()
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # as newer versions of Python do by themselves
    shaken_hands(client, server)


def shaken_hands(client_context, server_context):
    """Make the handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.getpeercert()
    assert server.getpeercert()


def test_flower_knows_every_option_and_can_read_its_value():
    """It ignores those it does not know, so a misspelt --read_only would leave it writable."""
    commands = [composed_options(), *(command[4:] for command in dockerfile_commands() if "flower" in command)]
    for option in [option for command in commands for option in command]:
        name, _, value = option.removeprefix("--").partition("=")
        known = options._options[name.replace("_", "-")]
        for each in value.split(",") if known.multiple else [value]:
            assert known.type is bool or known.type(each)
    for command in commands:
        assert "--read_only" in command


def dockerfile_commands():
    return [re.findall(r'"(.*?)"', command) for command in re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)]


def test_flower_shows_the_lane_beside_the_name_of_a_task():
    assert any(option.startswith("--tasks_columns=name,args,") for option in composed_options())


def test_nobody_but_this_machine_reaches_flower_and_nobody_without_its_password():
    assert 'ports: ["127.0.0.1:5555:5555"]' in COMPOSE
    assert re.search(r"FLOWER_BASIC_AUTH: .*\$\{FLOWER_PASSWORD:\?", COMPOSE)
    assert "FLOWER_UNAUTHENTICATED_API" not in COMPOSE


def test_every_variable_is_in_the_example_and_no_password_has_a_default():
    used = dict(re.findall(r"\$\{(\w+)(:.)", COMPOSE))
    assert used.keys() == EXAMPLE.keys()
    for name, operator in used.items():
        assert (operator == ":?") == ("PASSWORD" in name), name
        assert not ("PASSWORD" in name and EXAMPLE[name])


def test_everything_that_is_copied_into_the_image_exists_and_is_let_through():
    copied = [
        path for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()
    ]
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text("utf-8").split()
    examples = {"config/worker.toml", "config/router.toml"}  # the package has links to them
    assert {"pyproject.toml", "README.md", "fleet_worker", *examples} == set(copied)
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignore


def test_the_image_runs_as_a_user_of_its_own():
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]:
        users = re.findall(r"^USER (\w+)$", stage, re.MULTILINE)
        assert users[-1:] == ["fleet"] or (not users and stage.startswith("router"))


@pytest.mark.skipif(not importlib.util.find_spec("yaml"), reason="PyYAML is not installed")
def test_compose_is_yaml_with_the_services_we_describe():
    import yaml

    services = yaml.safe_load(COMPOSE)["services"]
    assert services.keys() == {"broker", "flower", "gateway", "router"}
    assert [service["command"] for service in services.values()] == composed_commands()
    stages = re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, re.MULTILINE)
    for name in ("flower", "gateway", "router"):
        build = services[name]["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert build["target"] in stages


def test_compose_accepts_its_file():
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    environment = {**os.environ, **dict.fromkeys(EXAMPLE, "x"), "FLEET_BROKER_ADDRESS": "127.0.0.1"}
    command = [docker, "compose", "-f", str(DOCKER / "compose.yaml"), "--profile", "*", "config", "--quiet"]
    subprocess.run(command, env=environment, check=True)
