"""Servers of several kinds serve one model: what one of them cannot do, another one does, or the caller is told."""

import pytest

from fleet_worker import Router, Settings, StreamInterrupted, UnsupportedParameter
from fleet_worker.simulator import Fault, reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.flow.conftest import work
from tests.mlx_clients import until

HELLO = [{"role": "user", "content": "Hello"}]
WHOLE = "".join(reply_tokens(HELLO, 32))
MODEL = "of-two-kinds"
KINDS = {"one": "mlx_lm", "two": "vllm_batched"}

pytestmark = [pytest.mark.rest, any_broker]


@pytest.fixture(scope="module")
def servers():
    one, two = (SimulatedMLX(flavour=flavour, models=[MODEL], token_interval=0.002) for flavour in KINDS.values())
    with one, two:
        yield {"one": one, "two": two}


@pytest.fixture(scope="module")
def router(broker, servers):
    instances = {name: {"base_url": server.base_url, "models": {MODEL: {}}} for name, server in servers.items()}
    with running_host(broker.url, instances, host="kinds"), Router(Settings(broker_url=broker.url)) as router:
        until(lambda: len(router.registry.offerings(MODEL, ready=True)) == 2, 20)
        yield router


def answers(router, **params):
    return {router.chat(MODEL, HELLO, timeout=20, max_tokens=2, **params).instance for _ in range(4)}


def test_a_request_goes_where_its_parameters_mean_something(router):
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    assert answers(router, frequency_penalty=0.5) == {"one"}
    assert answers(router, seed=7, temperature=0.5) == {"one"}
    assert answers(router, response_format=schema) == {"two"}


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"instance": "two"}, {"frequency_penalty": 0.5}),
        (
            {},
            {
                "frequency_penalty": 0.5,
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": "required",
            },
        ),
    ],
)
def test_what_nobody_can_do_is_refused_by_its_name(router, asked, params):
    """At once, without an attempt."""
    with pytest.raises(UnsupportedParameter) as raised:
        router.chat(MODEL, HELLO, timeout=20, **asked, **params)
    assert raised.value.metadata["param"] in params
    assert not raised.value.retryable


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_server_that_fails_when_it_is_told_to_continue_stays_in_service(router, servers, temperature):
    """It answers 500 to it every time. At temperature 0 it is not asked to."""
    two = servers["two"]
    for server in servers.values():
        server.fail(Fault("eof", at_token=20))
    two.fail(Fault("status", contains="continue_final_message", status=500, times=None))
    asked = {"temperature": temperature, "max_tokens": 32, "timeout": 20, "instance": "two"}
    for _ in range(4):
        stream = router.stream_chat(MODEL, HELLO, **asked)
        try:
            text = "".join(delta.content or "" for delta in stream)
            assert text == WHOLE
        except StreamInterrupted:
            assert temperature
        two.fail(Fault("eof", at_token=20))
    ready = [each.instance.name for each in router.registry.offerings(MODEL, ready=True)]
    assert sorted(ready) == ["one", "two"]
    assert work(two)
