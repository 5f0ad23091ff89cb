"""Checks of MLX servers: judgements, and every flavour of the simulated one."""

import socket
import time
from contextlib import closing

import pytest

from fleet_worker.mlx.client import DEFAULT_URLS
from fleet_worker.ops.findings import Finding
from fleet_worker.ops.server_checks import exposure, identity, instances
from fleet_worker.settings import Settings
from fleet_worker.simulator import FLAVOURS, Fault
from fleet_worker.testing import SimulatedMLX
from tests.brokers import free_port
from tests.mlx_clients import KINDS
from tests.tls import Certificates, Proxy

OPTED_IN = {"enabled": True, "respond_to_requests": True, "capabilities": ["chat", "stream_chat"]}
TABLE = "[instances.local.models]"


TEMPLATE = {"chat_template": __file__}
"""Any text that can be read."""


def examined(**instance):
    values = {"fleet": OPTED_IN, "models": {"sim-chat": {}}, **instance}
    values["models"] = {name: TEMPLATE | model for name, model in values["models"].items()}
    return instances(Settings(instances={"local": values}))


def complaints(findings):
    assert all(finding.check == "instances.local" for finding in findings)
    assert all(bool(finding.advice) is (finding.severity != "ok") for finding in findings)
    return [(finding.severity, finding.found) for finding in findings if finding.severity != "ok"]


def assert_complaint(findings, severity, *words):
    ((said, found),) = complaints(findings)
    assert said == severity
    for word in words:
        assert word in found


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_that_is_as_configured_is_fine(flavour):
    with SimulatedMLX(flavour=flavour) as mlx:
        (finding,) = examined(base_url=mlx.base_url, server=KINDS[flavour])
    assert (finding.severity, finding.check) == ("ok", "instances.local")
    assert mlx.base_url in finding.found
    assert not [request for request in mlx.requests if request.method != "GET"]


@pytest.mark.parametrize(
    ("configured", "flavour"),
    [("vllm_mlx", "mlx_lm"), ("openai", "mlx_lm"), ("omni", "mlx_openai"), ("mlx_lm", "rapid_mlx")],
)
def test_a_server_of_another_kind_is_an_error(configured, flavour):
    with SimulatedMLX(flavour=flavour) as mlx:
        findings = examined(base_url=mlx.base_url, server=configured)
    assert_complaint(findings, "error", f'"{configured}"', f"is {KINDS[flavour]}")


def test_a_server_behind_a_proxy_is_not_recognised():
    assert [finding.severity for finding in identity("mlx_lm", "openai")] == ["warning"]


def test_only_instances_that_have_opted_in_are_asked():
    with SimulatedMLX() as mlx:
        settings = {"base_url": mlx.base_url, "fleet": {"enabled": True}}
        assert instances(Settings(instances={"idle": settings})) == []
        assert not mlx.requests


def test_a_server_that_is_down_is_an_error_and_does_not_affect_the_others():
    with SimulatedMLX() as mlx:
        down, fine = instances(
            Settings(
                instances={
                    "down": {"base_url": f"http://127.0.0.1:{free_port()}", "fleet": OPTED_IN},
                    "fine": {"base_url": mlx.base_url, "fleet": OPTED_IN, "models": {"sim-chat": TEMPLATE}},
                }
            )
        )
    assert (down.severity, down.check, fine.severity, fine.check) == ("error", "instances.down", "ok", "instances.fine")
    assert "does not accept connections" in down.found


@pytest.mark.parametrize("models", [{"sim-chat": {}}, {}])
def test_a_web_server_is_no_mlx_server(models):
    """`python -m http.server`, and one that sends a page for whatever is asked."""
    with SimulatedMLX(flavour="openai") as mlx:
        for status in (404, 200):
            mlx.fail(*(Fault("status", path=path, status=status, body="<html>") for path in ("/health", "/v1/models")))
            assert_complaint(examined(base_url=mlx.base_url, models=models), "error", "no MLX server", mlx.base_url)


def test_a_server_that_redirects_is_an_error():
    with SimulatedMLX(flavour="openai") as mlx:
        mlx.fail(Fault("status", path="/health", status=307, headers={"location": "http://elsewhere/health"}))
        assert_complaint(examined(base_url=mlx.base_url), "error", "redirect")


def test_a_frozen_server_is_an_error_in_time():
    """Its host accepts the connection, and nothing answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as frozen:
        started = time.monotonic()
        findings = examined(base_url=f"http://127.0.0.1:{frozen.getsockname()[1]}", clocks={"connect": 0.3})
        assert time.monotonic() - started < 3
    assert_complaint(findings, "error", "does not answer in time")


def test_without_an_address_both_usual_ones_are_named():
    for port in (8000, 8080):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"something listens at port {port} of this machine")
    assert_complaint(examined(), "error", *DEFAULT_URLS)


def test_a_dead_generation_thread_is_an_error():
    with SimulatedMLX(faults=[Fault("thread_death", path="/health")]) as mlx:
        assert_complaint(examined(base_url=mlx.base_url), "error", "not ready")


def test_a_key_that_is_refused_is_an_error_that_does_not_show_it():
    with SimulatedMLX(flavour="vllm_batched", api_key="right") as mlx:
        findings = examined(base_url=mlx.base_url, api_key="hush-hush")
    assert_complaint(findings, "error", "check api_key")
    assert "hush" not in str(findings)


@pytest.mark.parametrize(("models", "severity"), [({"sim-chat": {}}, "warning"), ({}, "error")])
def test_a_list_of_models_that_cannot_be_read_matters_if_none_is_configured(models, severity):
    with SimulatedMLX(faults=[Fault("status", path="/v1/models", status=500)]) as mlx:
        assert_complaint(examined(base_url=mlx.base_url, models=models), severity, "list of models")


@pytest.mark.parametrize(
    ("flavour", "slots", "fine"),
    [
        ("vllm_simple", 2, False),
        ("omni", 2, False),
        ("vllm_simple", 1, True),
        ("vllm_batched", 8, True),
        ("mlx_lm", 8, True),
    ],
)
def test_a_server_that_does_one_thing_at_a_time_has_one_slot(flavour, slots, fine):
    with SimulatedMLX(flavour=flavour) as mlx:
        findings = examined(base_url=mlx.base_url, server=KINDS[flavour], limits={"concurrency": slots})
    assert complaints(findings) == (
        [] if fine else [("warning", "2 slots for a server that runs one request at a time")]
    )


# --- Models


def listed(flavour, models, reported=("sim-chat",), **instance):
    with SimulatedMLX(flavour=flavour, listed=list(reported)) as mlx:
        return examined(base_url=mlx.base_url, models=models, server=KINDS[flavour], **instance)


def test_models_should_be_listed():
    findings = listed("mlx_lm", {}, ["sim-chat", "big", "small"], model_blacklist=["big"])
    assert_complaint(findings, "warning", "2 of the 3")
    assert TABLE in findings[-1].advice


def test_an_instance_without_anything_to_offer_is_an_error():
    neither = {"backend": "default_model", "features": {"completion": False, "streaming": False}}
    assert_complaint(listed("mlx_lm", {}, []), "error", "nothing to offer")
    findings = listed("mlx_lm", {"mine": neither})
    assert_complaint(findings, "error", "nothing to offer")
    assert '[instances.local.models."mine"]' in findings[-1].advice


@pytest.mark.parametrize("flavour", ["vllm_batched", "mlx_openai"])
def test_where_the_list_is_complete_a_backend_has_to_be_in_it(flavour):
    findings = listed(flavour, {"mine": {"backend": "typo"}, "sim-chat": {}})
    assert_complaint(findings, "warning", "'typo'", "'mine'")
    assert "'sim-chat'" in findings[-1].advice


@pytest.mark.parametrize("flavour", ["omni", "openai"])
def test_where_the_list_is_not_nothing_is_concluded(flavour):
    assert complaints(listed(flavour, {"mine": {"backend": "other"}}, [])) == []


@pytest.mark.parametrize(("backend", "fine"), {"default_model": True, "sim-chat": True, "org/other": False}.items())
def test_mlx_lm_is_asked_only_for_what_it_has(backend, fine):
    findings = listed("mlx_lm", {"mine": {"backend": backend}})
    if fine:
        assert complaints(findings) == []
    else:
        assert_complaint(findings, "warning", "'org/other'", "download")
        assert "default_model" in findings[-1].advice


def test_a_server_that_holds_one_model_serves_one():
    findings = listed("mlx_lm", {"mine": {"backend": "default_model"}, "sim-chat": {}})
    assert_complaint(findings, "warning", "several backends")
    assert complaints(listed("mlx_lm", {"a": {"backend": "default_model"}, "b": {"backend": "default_model"}})) == []


def test_mlx_lm_has_no_embeddings():
    everything = {**OPTED_IN, "capabilities": ["chat", "embed"]}
    models = {"bge": {"backend": "default_model", "features": ["embedding"]}}
    assert_complaint(listed("mlx_lm", models, fleet=everything), "warning", "no embeddings")
    assert complaints(listed("mlx_openai", models | {"bge": {"backend": "sim-chat"}}, fleet=everything)) == []


@pytest.mark.parametrize(
    ("template", "fault"),
    {None: "'sim-chat' is not found", "/none.jinja": "is not found by chat_template = '/none.jinja'"}.items(),
)
def test_mlx_lm_goes_on_with_a_stream_by_a_template(template, fault):
    findings = listed("mlx_lm", {"sim-chat": {"chat_template": template}})
    assert_complaint(findings, "warning", "template of model 'sim-chat'", fault, "only at temperature 0")
    assert f"{TABLE[:-1]}.'sim-chat']" in findings[-1].advice


def test_a_template_beside_the_model_is_found(tmp_path):
    mine = {"mine": {"backend": "default_model", "chat_template": None}}
    assert_complaint(listed("mlx_lm", mine, [str(tmp_path)]), "warning", "'mine' is not found")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    assert complaints(listed("mlx_lm", mine, [str(tmp_path)])) == []


def test_nobody_else_needs_a_template():
    without = {"sim-chat": {"chat_template": None}}
    assert complaints(listed("vllm_batched", without)) == []
    assert complaints(listed("mlx_lm", without, fleet={**OPTED_IN, "capabilities": ["chat"]})) == []


def test_a_key_that_cannot_be_sent_is_an_error():
    (finding,) = examined(base_url="http://127.0.0.1:1", api_key="hüsh")
    assert isinstance(finding, Finding)
    assert (finding.severity, "api_key" in finding.found, "hüsh" in finding.found) == ("error", True, False)


@pytest.mark.parametrize(
    ("url", "is_exposed"),
    {
        "http://127.0.0.1:8080": False,
        "http://[::1]:8080": False,
        "http://localhost": False,
        "https://mini": False,
        "http://mini": True,
        "http://10.0.0.5:8080": True,
    }.items(),
)
def test_a_server_on_the_network_has_tls(url, is_exposed):
    assert [finding.severity for finding in exposure(url)] == ["warning"] * is_exposed


def test_a_server_with_tls_is_verified_and_said_to_be(tmp_path):
    made = Certificates(tmp_path)
    with SimulatedMLX(models=["sim-chat"]) as mlx, Proxy(made, mlx.port) as proxy:
        server = {"base_url": f"https://localhost:{proxy.port}", "models": {"sim-chat": TEMPLATE}}
        found = [finding.found for finding in examined(**server, ca=made.ca) if finding.severity == "ok"]
        assert found[0].endswith("answers; chain and host name of its certificate are verified")
        (finding,) = examined(**server, ca=made.other_ca, clocks={"connect": 0.2})
    assert finding.severity == "error"
    assert "has a certificate of a CA that is not trusted here: set ca to" in finding.found
