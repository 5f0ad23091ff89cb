"""What operators see of a server's prompt cache, on both brokers: `status`, `doctor`, and what nodes tell routers."""

import pytest

from fleet_worker import Settings
from fleet_worker.ops.doctor import fleet
from fleet_worker.ops.findings import Finding
from fleet_worker.protocol.status import CacheTrouble
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.flow.conftest import CHAT
from tests.mlx_clients import until

OFTEN = {"FLEET_REGISTRY__READINESS_INTERVAL": "0.5"}
SECRET = "correct-horse-battery-staple"

pytestmark = [pytest.mark.rest, any_broker]


@pytest.fixture(scope="module")
def host(broker):
    with (
        SimulatedMLX(flavour="mlx_lm", models=[CHAT]) as mlx,
        running_host(broker.url, {"sim": {"base_url": mlx.base_url, "models": {CHAT: {}}}}, env=OFTEN),
    ):
        yield


def converse(router, turns, about, system):
    """Return the last reply of a conversation whose system prompt is `system(turn)`."""
    said = [{"role": "user", "content": f"{about} {SECRET}"}]
    for turn in range(turns):
        reply = router.chat(CHAT, [{"role": "system", "content": system(turn)}, *said], max_tokens=20, timeout=20)
        answer = {"role": "assistant", "content": reply.content}
        said += [answer, {"role": "user", "content": f"{SECRET} {turn}"}]
    return reply


def seen(router):
    (instance,) = router.registry.instances()
    return instance


def test_what_was_cached_is_counted_and_the_doctor_names_a_conversation_that_no_cache_helps(host, router, broker):
    settings = Settings(broker_url=broker.url)
    reply = converse(router, 3, "tea", lambda turn: "You are helpful. " * 50)
    assert reply.usage.cached_tokens > reply.usage.prompt_tokens / 2
    until(lambda: seen(router).cached_tokens)
    assert 0.3 < seen(router).cached_share < 1
    assert [each for each in fleet(settings) if each.check == "prompt cache"] == []

    reply = converse(router, 5, "time", lambda turn: f"It is {turn} o'clock. You are helpful. {'Very. ' * 50}")
    until(lambda: seen(router).cache_troubles)
    assert seen(router).cache_troubles == (
        CacheTrouble(kind="changing", model=CHAT, count=3, of=4, request_id=reply.request_id),
    )
    (warning,) = [each for each in fleet(settings) if each.check == "prompt cache"]
    assert isinstance(warning, Finding)
    assert warning.found.startswith("sim@test: 3 of 4 requests")
    assert SECRET not in str(warning)
