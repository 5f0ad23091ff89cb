"""A caller asks again and again for what every server fails with. He is told why, and nobody else notices."""

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import FleetError, Router, Settings
from fleet_worker.simulator import Fault
from tests.brokers import any_broker
from tests.fleets import Fleet, conversation

GOOD, BAD = 50, 20
FLAVOURS = {"one": "vllm_batched", "two": "mlx_openai"}

pytestmark = [
    pytest.mark.rest,
    pytest.mark.timeout(240),
    any_broker,
]


@pytest.fixture(scope="module")
def fleet(broker):
    """Canaries that failed are as rare as they are by default."""
    env = {"FLEET_WORKER__CANARY_INTERVAL": "60"}
    with Fleet(broker.url, FLAVOURS, natural=20, token_interval=0.01, embeds="one", env=env) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def usual(broker, fleet):
    """Seconds that the slowest good request takes while nobody asks badly."""
    with Router(Settings(broker_url=broker.url)) as router:
        fleet.wait_until_ready(router, FLAVOURS)
        return max(good(router, fleet))


@pytest.fixture
def router(broker, fleet):
    with Router(Settings(broker_url=broker.url)) as router:
        fleet.wait_until_ready(router, FLAVOURS)
        yield router


def good(router, fleet):
    """Seconds that each of the good requests took."""

    def ask(number):
        started, messages = time.monotonic(), conversation(number)
        assert router.chat(fleet.model, messages, timeout=60).content == fleet.expected(messages, 20)
        time.sleep(0.1)
        return time.monotonic() - started

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(GOOD)))


def bad(ask):
    """The errors that the caller got."""
    errors = []
    for _ in range(BAD):
        with pytest.raises(FleetError) as caught:
            ask()
        errors.append(caught.value)
    return errors


def beside(router, fleet, usual, ask):
    """Ask badly and well at the same time; return the errors, and how much longer the slowest good request took."""
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(bad, ask)
        slowest = max(good(router, fleet))
        errors = told.result(120)
    assert fleet.ready(router) == set(fleet.servers)
    return errors, slowest - usual


def status(code, said=None, **more):
    return Fault("status", status=code, body=said and {"detail": said}, times=None, **more)


NO_MODEL = "The model `x` does not exist"
KINDS = {
    "a template that refuses": ([status(500, "System role not supported")], {"invalid_request"}, "system message"),
    "500": ([status(500)], {"invalid_request"}, "answered 500, on 2 nodes alike"),
    "400": ([status(400)], {"invalid_request"}, r"refused the request \(400\)"),
    "422": ([status(422)], {"invalid_request"}, r"refused the request \(422\)"),
    "413": ([status(413)], {"invalid_request"}, r"refused the request \(413\)"),
    "404 of a model": ([status(404, NO_MODEL)], {"model_not_served"}, "does not have the model"),
    "503": ([status(503, "no")], {"instance_unavailable"}, r"not ready \(503\)"),
    "429": ([status(429)], {"overloaded"}, r"busy \(429\)"),
    "504": ([status(504)], {"timeout"}, r"gave up \(504\), on 2 nodes alike"),
    "a reset": ([Fault("reset", times=None)], {"invalid_request"}, ", on 2 nodes alike"),
    "an empty reply": ([Fault("empty_reply", times=None)], {"invalid_request"}, ", on 2 nodes alike"),
    "an error in a stream": ([Fault("early_error", times=None)], {"invalid_request"}, "answered 500"),
    "a reset after some tokens": (
        [Fault("reset", at_token=3, times=None)],
        {"connection_failure", "invalid_request"},  # what was on its way is lost with the connection
        "broke",
    ),
    "silence": ([Fault("freeze", times=None)], {"timeout"}, "within its timeout|deadline passed"),  # router or node
    "something else each time": (
        [Fault("status", status=code, times=1) for code in (400, 500, 503, 422, 404, 500, 413, 503) * 8],
        {"invalid_request", "provider_error", "instance_unavailable", "model_not_served", "unsupported_capability"},
        "",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_every_server_fails_with_delays_no_other(router, fleet, usual, kind):
    faults, codes, text = KINDS[kind]
    word = f"wizard-{kind.replace(' ', '-')}"
    for server in fleet.servers.values():
        server.fail(*(Fault(**{**vars_of(fault), "contains": word}) for fault in faults))
    messages = [{"role": "user", "content": word}]
    timeout = 0.75 if kind == "silence" else 1.5  # each of them waits for all of it
    errors, delay = beside(router, fleet, usual, lambda: list(stream(router, fleet, messages, timeout)))
    print(f"{kind}: the slowest of {GOOD} took {delay:.2f} s longer than usual; {errors[0].message}")
    assert {error.code for error in errors} <= codes
    assert not [error.message for error in errors if not re.search(text, error.message)]
    assert delay < 2.0


@pytest.mark.parametrize("kind", ["500", "an error in a stream"])
def test_servers_with_one_slot_that_refuse_a_second_request_are_not_in_the_way_of_others(broker, kind):
    """vllm-mlx's Simple engine answers an error 500 to what comes while it works, also for a canary."""
    faults, codes, _ = KINDS[kind]
    flavours = dict.fromkeys(("one", "two"), "vllm_simple")
    with (
        Fleet(broker.url, flavours, slots=1, natural=20, token_interval=0.01) as fleet,
        Router(Settings(broker_url=broker.url)) as router,
    ):
        fleet.wait_until_ready(router, flavours)
        for server in fleet.servers.values():
            server.fail(*(Fault(**{**vars_of(fault), "contains": "wizard"}) for fault in faults))
        messages = [{"role": "user", "content": "wizard"}]
        usual = max(good(router, fleet))
        errors, delay = beside(router, fleet, usual, lambda: list(stream(router, fleet, messages)))
        told = Counter(error.code for error in errors)
        print(f"{kind}, one slot: the slowest of {GOOD} took {delay:.2f} s longer than usual; {dict(told)}")
        # If both nodes had other work in their slots each time, nothing is known about the request.
        assert told.keys() <= {*codes, "provider_error"}
        assert told["provider_error"] < BAD / 4
        assert delay < 2.0


def test_a_text_that_no_embedder_takes_delays_no_chat(router, fleet, usual):
    fleet.servers["one"].fail(Fault("status", status=500, contains="wizard-text", times=None))
    errors, delay = beside(router, fleet, usual, lambda: router.embed(fleet.embedder, "wizard-text", timeout=20))
    assert {error.code for error in errors} == {"provider_error"}  # there is one embedder only
    assert delay < 2.0
    assert router.embed(fleet.embedder, "a good text", timeout=20).dimensions


def vars_of(fault):
    return {name: getattr(fault, name) for name in fault.__slots__}


def stream(router, fleet, messages, timeout=1.5):
    with router.stream_chat(fleet.model, messages, timeout=timeout, temperature=0) as deltas:
        yield from deltas
