"""A node takes work only while its instance really can do it, and its routers know."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import FleetError, InvalidRequest, ModelUnavailable, Router, Settings
from fleet_worker.simulator import Fault
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.flow.conftest import work

HELLO = [{"role": "user", "content": "Hello"}]
SLOW_HEALTH = {"kind": "slow_headers", "path": "/health", "seconds": 60, "times": None}
QUICK = {
    "FLEET_WORKER__CANARY_INTERVAL": "1",
    "FLEET_WORKER__STALL_AFTER": "1",
    "FLEET_WORKER__MODELS_INTERVAL": "1",
    "FLEET_REGISTRY__READINESS_INTERVAL": "1",
    "FLEET_REGISTRY__MODELS_INTERVAL": "1",
}


@pytest.fixture(scope="module")
def servers():
    with (
        SimulatedMLX(flavour="vllm_batched", models=["both", "first"], token_interval=0.002) as one,
        SimulatedMLX(flavour="vllm_batched", models=["both"], token_interval=0.002) as two,
    ):
        yield {"one": one, "two": two}


@pytest.fixture(scope="module")
def host(broker, servers):
    instances = {
        "one": {"models": {"both": {}, "first": {}}, "features": {"tools": True}},
        "two": {"models": {"both": {"context_window": 4096}}, "limits": {"concurrency": 2}},
    }
    for name, server in servers.items():
        instances[name]["base_url"] = server.base_url
    with running_host(broker.url, instances, env=QUICK) as processes:
        yield processes


@pytest.fixture(autouse=True)
def ready(host, servers, router):
    """Whatever a test has broken is mended before the next one, and the nodes notice by themselves."""
    yield
    for server in servers.values():
        server._plan.clear()
        if not server._thread.is_alive():
            server.restart()
    wait_until(lambda: len(router.registry.offerings(ready=True)) == 3, 20)


def wait_until(true, seconds=10.0):
    """Return the seconds that it took."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, "it did not come true in time"
        time.sleep(0.01)
    return time.monotonic() - started


def statuses(router):
    return {state.name: state.status for state in router.registry.instances()}


def lanes(router, name):
    return next(state.lanes for state in router.registry.instances() if state.name == name)


def ask(router, model="both", **options):
    return router.chat(model, HELLO, max_tokens=2, timeout=20, **options)


def test_a_fresh_router_knows_the_fleet(broker, router):
    wait_until(lambda: len(router.registry.offerings(ready=True)) == 3)
    with Router(Settings(broker_url=broker.url)) as fresh:
        registry = fresh.registry
        assert registry.models() == ["both", "first"]
        both = registry.offerings("both")
        assert {offered.instance.slots for offered in both} == {1, 2}
        assert [offered.limits.get("context_window") for offered in both if offered.node == "two@test"] == [4096]
        assert [offered.node for offered in registry.offerings(feature="tools", capability="stream_chat")] == [
            "one@test",
            "one@test",
        ]
        assert all(offered.ready for offered in both)
        assert registry.offerings(ready=False) == registry.offerings("another") == []


def test_a_model_that_nobody_offers_fails_at_once(router, servers):
    wait_until(lambda: statuses(router) == {"one": "available", "two": "available"})
    before = [len(work(server)) for server in servers.values()]
    started = time.monotonic()
    with pytest.raises(ModelUnavailable, match="both") as caught:
        ask(router, "bath")
    assert time.monotonic() - started < 2
    assert caught.value.metadata["nearest"] == ["both"]
    for options in ({"model": "first", "instance": "two"}, {"model": "nothing-like-it"}):
        with pytest.raises(ModelUnavailable):
            ask(router, **options)
    with pytest.raises(ModelUnavailable):
        router.embed("both", "a text")
    assert [len(work(server)) for server in servers.values()] == before


def test_a_dead_server_takes_no_work_and_no_request_fails(router, servers):
    """Of two hundred requests, sent before, while and after one of two servers dies."""

    def request(number):
        if number == 40:
            servers["one"].kill()
        return ask(router)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(request, range(200)))
    assert {reply.node for reply in replies[-100:]} == {"two@test"}
    assert statuses(router)["one"] == "unavailable"
    assert lanes(router, "one") == ()
    assert {offered.node: offered.ready for offered in router.registry.offerings("both")} == {
        "one@test": False,
        "two@test": True,
    }


@any_broker
def test_a_server_that_comes_back_is_used_again(router, servers):
    servers["one"].kill()
    wait_until(lambda: statuses(router)["one"] == "unavailable")
    servers["one"].restart()
    assert ask(router, "first").node == "one@test"  # it waited in its lane for it
    wait_until(lambda: statuses(router)["one"] == "available")


def test_work_waits_in_its_lane_while_the_only_server_of_it_is_away(router, servers):
    servers["one"].kill()
    wait_until(lambda: statuses(router)["one"] == "unavailable")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, router, "first")
        servers["one"].restart()
        assert waiting.result(20).node == "one@test"


@pytest.mark.rest
@any_broker
def test_a_server_that_answers_late_is_left_alone_until_it_answers(router, servers):
    servers["one"].fail(Fault(**SLOW_HEALTH))
    wait_until(lambda: statuses(router)["one"] == "degraded")
    assert lanes(router, "one") == ()
    asked = len([request for request in servers["one"].requests if request.method == "POST"])
    servers["one"]._plan.clear()
    wait_until(lambda: statuses(router)["one"] == "available")
    assert len([request for request in servers["one"].requests if request.method == "POST"]) == asked  # no canary


@any_broker
def test_a_late_answer_is_no_trouble_while_tokens_flow(router, servers):
    with router.stream_chat("first", HELLO, max_tokens=400, timeout=20) as stream:
        next(stream)
        servers["one"].fail(Fault(**SLOW_HEALTH))
        for _ in stream:
            assert statuses(router)["one"] == "available"


@any_broker
def test_a_healthy_server_that_fails_every_request_is_left(router, servers):
    """Or it would be the fastest to fail a thousand of them."""
    servers["one"].fail(Fault("status", status=500, times=None))
    with pytest.raises(FleetError):
        ask(router, "first")  # three attempts
    wait_until(lambda: statuses(router)["one"] == "unavailable")
    assert {ask(router).node for _ in range(10)} == {"two@test"}
    time.sleep(2.5)  # its canaries fail too
    assert statuses(router)["one"] == "unavailable"


@any_broker
def test_a_conversation_that_all_servers_refuse_costs_none_its_lanes(router, servers):
    """And its caller is told that it is the request."""
    for server in servers.values():
        server.fail(Fault("status", status=500, contains="wizard", times=None))
    served = {name: lanes(router, name) for name in servers}
    for _ in range(4):
        with pytest.raises(InvalidRequest, match="answered 500, on 2 nodes alike") as told:
            router.chat("both", [{"role": "user", "content": "wizard"}], timeout=20)
        assert {attempt["node"] for attempt in told.value.metadata["attempts"]} == {"one@test", "two@test"}
        assert ask(router).node in ("one@test", "two@test")
    assert {name: lanes(router, name) for name in servers} == served
    assert set(statuses(router).values()) == {"available"}


@pytest.mark.rest
@any_broker
def test_a_server_that_falls_silent_in_the_middle_is_left(router, servers):
    servers["one"].fail(Fault("freeze", at_token=0, times=None))
    with ThreadPoolExecutor(1) as pool:
        frozen = pool.submit(router.chat, "first", HELLO, max_tokens=50, timeout=4)
        wait_until(lambda: statuses(router)["one"] == "degraded")
        assert lanes(router, "one") == ()
        with pytest.raises(FleetError):
            frozen.result(10)


def test_only_the_lanes_of_a_model_that_is_gone_are_left(router, servers):
    one = servers["one"]
    one.fail(
        Fault("status", status=404, body={"detail": "The model does not exist"}, contains="first", times=None),
        Fault("status", status=500, path="/v1/models", times=None),  # or the model would be offered again in a second
    )
    with pytest.raises(FleetError):
        ask(router, "first")
    wait_until(lambda: not any("first" in lane for lane in lanes(router, "one")))
    assert any("both" in lane for lane in lanes(router, "one"))
    assert [offered.ready for offered in router.registry.offerings("first")] == [False]


@any_broker
def test_the_figures_of_this_moment_can_be_asked_for(router):
    """Six times within half a second: the beat of one second alone would not do that."""
    wait_until(lambda: statuses(router) == {"one": "available", "two": "available"})
    for _ in range(6):
        before = time.monotonic()
        router.registry.refresh()
        wait_until(lambda before=before: min(state.heard_at for state in router.registry.instances()) > before, 0.5)
