"""Whole hosts fall silent under a request: their MLX server, their node and their registry node at the same moment."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from fleet_worker import PoisonSuspected, Router, Settings
from tests.fleets import Fleet, conversation, until

LOST_AFTER = 2.0
TOKENS = 60

pytestmark = [pytest.mark.rest, pytest.mark.timeout(150), pytest.mark.parametrize("broker", ["valkey"], indirect=True)]


@pytest.fixture(scope="module")
def hosts(broker):
    """Three, of one model."""
    with ExitStack() as stack:
        first = stack.enter_context(Fleet(broker.url, {"local": "mlx_lm"}, natural=TOKENS, token_interval=0.05))
        others = [
            stack.enter_context(
                Fleet(broker.url, {"local": "mlx_lm"}, natural=TOKENS, token_interval=0.05, model=first.model)
            )
            for _ in range(2)
        ]
        yield [first, *others]


@pytest.fixture
def router(broker, hosts):
    with Router(Settings(broker_url=broker.url, router={"lost_after": LOST_AFTER})) as router:
        until(lambda: all_are_ready(router, hosts), 30)
        yield router


def all_are_ready(router, hosts):
    """A host that has just thawed may not have heard the question of a new router."""
    router.registry.refresh()
    time.sleep(0.5)
    return len(router.registry.offerings(hosts[0].model, ready=True)) == len(hosts)


class Asked:
    """A stream that somebody reads. Leaving the block waits for its end."""

    def __init__(self, router, hosts, timeout):
        self._hosts = {host.node_name("local"): host for host in hosts}
        messages = conversation("silence")
        self.expected = hosts[0].expected(messages, TOKENS)
        self._stream = router.stream_chat(hosts[0].model, messages, max_tokens=TOKENS, temperature=0, timeout=timeout)
        self._pool = ThreadPoolExecutor(1)
        self._text = self._pool.submit(lambda: "".join(delta.content or "" for delta in self._stream))
        self.struck = []

    def strike(self, strike):
        """All processes of the host that has it, which is one that has not been struck."""
        until(lambda: self._node not in (None, *self.struck), 30)
        self.struck.append(self._node)
        for part in (host := self._hosts[self.struck[-1]]).parts:
            strike(part)
        return host

    @property
    def _node(self):
        return self._stream.progress and self._stream.progress.node

    def text(self):
        return self._text.result(60)

    @property
    def attempts(self):
        return self._stream.response.attempts


def test_two_hosts_that_sleep_under_a_request_are_no_reason_to_refuse_it(hosts, router):
    asked = Asked(router, hosts, timeout=60)
    first, second = (asked.strike(lambda part: part.freeze()) for _ in range(2))
    time.sleep(LOST_AFTER + 0.7)
    for part in first.parts:
        part.thaw()
    assert asked.text() == asked.expected
    assert [attempt.error for attempt in asked.attempts] == ["node_lost", "node_lost", None]
    assert [attempt.node for attempt in asked.attempts][:2] == asked.struck
    for part in second.parts:
        part.thaw()


def test_a_request_under_which_two_hosts_restart_is_not_sent_to_a_third(hosts, router):
    asked = Asked(router, hosts, timeout=240)
    struck = [asked.strike(lambda part: part.kill()) for _ in range(2)]
    for host in struck:
        for part in host.parts:
            part.start()
    with pytest.raises(PoisonSuspected) as poison:
        asked.text()
    assert [attempt["node"] for attempt in poison.value.metadata["attempts"]] == asked.struck
