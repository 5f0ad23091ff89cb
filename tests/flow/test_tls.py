"""TLS to both brokers, with certificates that the tests make: RabbitMQ's own listener, a proxy before Valkey."""

import time
from urllib.parse import urlsplit

import pytest

from fleet_worker import BrokerUnavailable, Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import waiting
from fleet_worker.broker.topology import transport_of
from fleet_worker.host.child_process import child
from fleet_worker.host.up.programs import node_command
from fleet_worker.ops.broker_checks import broker as check_broker
from fleet_worker.ops.doctor import fleet
from fleet_worker.ops.drain import drain
from fleet_worker.testing import SimulatedMLX, running_host, worker_toml
from tests.brokers import Secured
from tests.flower import running_flower
from tests.mlx_clients import HELLO, took_less_than
from tests.tls import LONG_AGO, Certificates, Proxy

MODEL = "sim-chat"
WRONG = {
    "expired": "has a certificate that has expired",
    "other host": "has a certificate for another host",
    "unknown CA": "has a certificate of a CA that is not trusted here",
    "own CA not set": "has a certificate of a CA that is not trusted here",
    "issued by another": "has a certificate of a CA that is not trusted here",
    "no client certificate": "asks for a client certificate",
    "client certificate of another CA": "refuses the client certificate: its CA is unknown there",
    "client certificate expired": "refuses the client certificate: it has expired",
}


@pytest.fixture
def secured(broker):
    with broker.secured() as secured:
        yield secured


def settings_for(fault: str, secured: Secured) -> Settings:
    """Bring this fault about, and return the settings of a client that meets it."""
    url, files, made = secured.url, dict(secured.files), secured.certificates
    past = {"not_before": LONG_AGO.replace(year=2000), "not_after": LONG_AGO}
    match fault:
        case "expired":
            secured.show(made.issue("expired", "localhost", **past))
        case "other host":
            url = url.replace("localhost", "127.0.0.1")
        case "unknown CA":
            files["broker_ca"] = made.other_ca
        case "own CA not set":
            del files["broker_ca"]
        case "issued by another":
            secured.show(made.issue("impostor", "localhost", by="other"))
        case "no client certificate":
            files = {"broker_ca": made.ca}
        case "client certificate of another CA":
            files["broker_cert"], files["broker_key"] = made.issue("stranger", "a@b.example", by="other")
        case "client certificate expired":
            files["broker_cert"], files["broker_key"] = made.issue("late", "a@b.example", **past)
    return Settings(broker_url=url, **files)


@pytest.mark.both_brokers
def test_a_broker_that_proves_who_it_is_is_used_and_the_doctor_tells_what_was_verified(secured):
    first, *_, last = check_broker(Settings(broker_url=secured.url, **secured.files))
    assert first.severity == last.severity == "ok"
    assert last.found == (
        "TLSv1.3: chain and host name are verified, the broker's certificate is valid until 3000-01-01; "
        "a client certificate is sent"
    )


@pytest.mark.rest
@pytest.mark.parametrize("fault", WRONG)
def test_every_way_to_the_broker_tells_at_once_what_is_wrong_with_a_certificate(fault, secured):
    settings = settings_for(fault, secured)
    (finding,) = check_broker(settings)
    assert (finding.severity, WRONG[fault] in finding.found) == ("error", True), finding
    assert finding.advice
    ways = [
        lambda: fleet(settings),
        lambda: drain(settings, ["one@nowhere"]),
        lambda: waiting(create_app(settings), transport_of(settings.broker_url), ["llm.fleet.chat.m"]),
        lambda: Router(settings).chat(MODEL, HELLO),
    ]
    for way in ways:
        with took_less_than(8), pytest.raises(BrokerUnavailable) as caught:
            way()
        assert WRONG[fault] in caught.value.message
        assert caught.value.metadata["advice"] == finding.advice


@pytest.mark.rest
@pytest.mark.parametrize(
    ("query", "what"), [("?ssl_cert_reqs=none", "certificate"), ("?ssl_check_hostname=false", "host name")]
)
def test_what_is_turned_off_is_not_verified_and_the_doctor_warns(query, what, secured):
    url = secured.url.replace("localhost", "127.0.0.1") + query
    *_, last = check_broker(Settings(broker_url=url, **secured.files))
    assert last.severity == "warning"
    assert f"the broker's {what} is not verified" in last.found


@pytest.mark.rest
def test_a_certificate_that_is_renewed_is_used_by_the_next_connection(secured):
    settings = settings_for("expired", secured)
    assert check_broker(settings)[0].severity == "error"
    secured.show(secured.certificates.server)
    assert check_broker(settings)[-1].severity == "ok"


@pytest.mark.rest
def test_a_fleet_works_over_tls(secured):
    files = {f"FLEET_{name.upper()}": str(path) for name, path in secured.files.items()}
    settings = Settings(broker_url=secured.url, **secured.files)
    with (
        SimulatedMLX(models=[MODEL]) as mlx,
        running_flower(secured.url, **files) as flower,
        running_host(secured.url, {"one": {"base_url": mlx.base_url, "models": {MODEL: {}}}}, env=files),
        Router(settings) as router,
    ):
        flower.wait_for_workers("one@test")
        whole = router.chat(MODEL, HELLO, max_tokens=50, temperature=0).content
        with router.stream_chat(MODEL, HELLO, max_tokens=50, temperature=0) as stream:
            assert "".join(delta.content or "" for delta in stream) == whole
            next(iter(stream), None)
        assert drain(settings, ["one@test"]) == 0


@pytest.mark.rest
def test_a_node_whose_broker_is_not_authentic_waits_between_its_tries_and_says_so_in_one_line(broker, tmp_path):
    made, plain = Certificates(tmp_path), urlsplit(broker.url)
    user = "guest:guest@" if broker.name == "rabbitmq" else ""
    with SimulatedMLX(models=[MODEL]) as mlx, Proxy(made, plain.port) as proxy:
        scheme = "amqps" if broker.name == "rabbitmq" else "rediss"
        url = f"{scheme}://{user}localhost:{proxy.port}{plain.path}"
        proxy.show(made.issue("impostor", "localhost", by="other"))
        config = tmp_path / "worker.toml"
        config.write_text(worker_toml("one", {"base_url": mlx.base_url, "models": {MODEL: {}}}), "utf-8")
        places = {"FLEET_CONFIG": str(config), "FLEET_STATE_DIR": str(tmp_path)}
        environment = {**places, "FLEET_BROKER_URL": url, "FLEET_BROKER_CA": str(made.ca)}
        with child("a node", node_command("one@test"), environment) as process:
            process.wait_for("has a certificate of a CA that is not trusted here: set broker_ca", 20)
            before = proxy.accepted
            time.sleep(5)
            assert proxy.accepted - before <= 5
            assert process.output.count("has a certificate") == 1
            assert "Traceback" not in process.output
            proxy.show(made.server)
            process.wait_for("is ready", 20)
