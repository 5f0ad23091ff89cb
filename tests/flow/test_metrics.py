"""What Prometheus sees of a host: a node, its registry node, requests that wait, fail and are answered."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import FleetError, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import waiting
from fleet_worker.broker.topology import lane, transport_of
from fleet_worker.simulator import Fault, reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host
from tests.flow.conftest import CHAT, EMBED
from tests.scrapes import ON, metrics_url, samples, scrape, until

SECRET = "correct-horse-battery-staple"
PROMPT = [{"role": "user", "content": SECRET}]
NODE = ("node", "sim@test")

pytestmark = pytest.mark.parametrize("broker", ["valkey"], indirect=True)  # lane_depths.py is what differs


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], token_interval=0.01, tokens=10_000) as server:
        yield server


@pytest.fixture(scope="module")
def host(broker, mlx):
    instance = {"base_url": mlx.base_url, "models": {CHAT: {}, EMBED: {}}}
    with running_host(broker.url, {"sim": instance}, env=ON) as processes:
        yield processes


def in_lane(broker, name):
    with create_app(Settings(broker_url=broker.url)) as app:
        return waiting(app, transport_of(broker.url), [name])[name].depth


def test_a_host_shows_its_slots_and_what_waits_and_then_what_it_did(host, broker, router, mlx):
    url, chats = metrics_url(host), lane("chat", CHAT)
    with mlx.held(at_token=50), ThreadPoolExecutor() as pool:
        stream = router.stream_chat(CHAT, PROMPT, max_tokens=150, timeout=60)
        next(stream)
        chatting = [pool.submit(router.chat, CHAT, PROMPT, max_tokens=7, timeout=60) for _ in range(2)]
        while in_lane(broker, chats) < 2:
            time.sleep(0.02)
        busy = until(url, lambda seen: seen.get(("fleet_slots_used", NODE)))
        assert busy[("fleet_lane_depth", ("lane", chats))] == 2
        assert busy[("fleet_lane_served", ("lane", chats))] == busy[("fleet_broker_up",)] == 1
        assert busy[("fleet_instance_ready", NODE)] == busy[("fleet_slots", NODE)] == 1
        mlx.release()
        list(stream)
        replies = [each.result() for each in chatting]
    router.embed(EMBED, [SECRET], timeout=20)
    mlx.fail(Fault("eof", at_token=3))
    with pytest.raises(FleetError) as failed:
        list(router.stream_chat(CHAT, PROMPT, max_tokens=9, timeout=20, on_interrupt="fail"))

    done = until(url, lambda seen: seen.get(("fleet_errors_total", ("code", failed.value.code), NODE)))
    assert done[("fleet_tokens_total", NODE)] == 150 + 7 + 7 + 3
    assert done[("fleet_requests_total", NODE, ("operation", "stream_chat"))] == 1
    assert done[("fleet_requests_total", NODE, ("operation", "chat"))] == 2
    assert done[("fleet_requests_total", NODE, ("operation", "embed"))] == 1
    assert done[("fleet_queue_wait_seconds_count", NODE)] == 4
    assert done[("fleet_ttft_seconds_count", NODE)] == done[("fleet_generation_tokens_per_second_count", NODE)] == 3
    assert done[("fleet_ttft_seconds_sum", NODE)] == pytest.approx(
        stream.response.timings.ttft + sum(reply.timings.ttft for reply in replies), abs=0.001
    )
    assert done[("fleet_slots_used", NODE)] == 0
    assert done[("fleet_registry_age_seconds",)] < 60


def test_no_word_of_a_request_is_in_it(host, router):
    url = metrics_url(host)
    before = samples(url)[("fleet_requests_total", NODE, ("operation", "chat"))]
    names = {"caller": {"who": SECRET}, "trace_context": {"id": SECRET}, "idempotency_key": SECRET}
    reply = router.chat(CHAT, PROMPT, max_tokens=5, timeout=20, **names)
    until(url, lambda seen: seen[("fleet_requests_total", NODE, ("operation", "chat"))] > before)
    text = scrape(url) + host["registry"].output
    for word in (SECRET, reply.content, reply.request_id, "".join(reply_tokens(PROMPT, 5, tokens=10_000))):
        assert word not in text


def test_a_node_that_ended_is_not_ready_and_has_no_figures(host):
    url = metrics_url(host)
    host["sim"].stop()
    gone = until(url, lambda seen: not seen[("fleet_instance_ready", NODE)])
    assert gone[("fleet_instance_status", NODE, ("status", "unavailable"))] == 1
    assert {key[0] for key in gone if NODE in key} == {"fleet_instance_ready", "fleet_instance_status"}
    assert not any(value for (name, *_), value in gone.items() if name == "fleet_lane_served")
