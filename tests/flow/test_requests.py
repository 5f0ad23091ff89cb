"""Chat, stream and embedding through a real node, from threads and from asyncio."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import (
    BrokerUnavailable,
    Expired,
    InvalidRequest,
    ModelNotServed,
    Router,
    Settings,
    UnsupportedCapability,
)
from fleet_worker.simulator import embedding, reply_tokens
from tests.brokers import free_port
from tests.flow.conftest import CHAT, EMBED, work

pytestmark = pytest.mark.usefixtures("node")

HELLO = [{"role": "user", "content": "Hello"}]


def expected(messages, max_tokens):
    return "".join(reply_tokens(messages, max_tokens))


@pytest.mark.both_brokers
def test_a_chat_returns_the_whole_answer_with_its_facts(router, node):
    reply = router.chat(CHAT, HELLO, max_tokens=12, timeout=20)
    assert reply.content == expected(HELLO, 12)
    assert (reply.finish_reason, reply.model, reply.node, reply.instance) == ("length", CHAT, "sim@test", "sim")
    assert reply.usage.completion_tokens == 12
    assert 0 <= reply.timings.queue_wait < 20
    assert 0 < reply.timings.ttft <= reply.timings.duration


@pytest.mark.both_brokers
def test_a_stream_arrives_in_pieces_that_make_the_same_answer(router):
    with router.stream_chat(CHAT, HELLO, max_tokens=20, timeout=20) as stream:
        pieces = [delta.content for delta in stream]
    assert len(pieces) == 20
    assert "".join(pieces) == stream.response.content == expected(HELLO, 20)
    assert stream.response.finish_reason == "length"


@pytest.mark.both_brokers
def test_an_embedding_keeps_the_order_of_its_texts(router):
    texts = [f"text {number}" for number in range(100)]
    reply = router.embed(EMBED, texts, timeout=20)
    assert reply.dimensions == 384
    for text, vector in zip(texts, reply.vectors, strict=True):
        assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(vector, embedding(text), strict=True))


def test_many_short_requests_follow_each_other(router):
    """Each makes three events for Flower, which must not keep the node from its work."""
    for _ in range(60):
        assert router.chat(CHAT, HELLO, max_tokens=1, timeout=10).finish_reason == "length"


@pytest.mark.both_brokers
def test_many_threads_share_one_router(router):
    def ask(number):
        messages = [{"role": "user", "content": f"question {number}"}]
        return router.chat(CHAT, messages, max_tokens=8, timeout=30).content == expected(messages, 8)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(48)))


def test_many_asyncio_tasks_share_one_router(router):
    async def stream(number):
        messages = [{"role": "user", "content": f"question {number}"}]
        async with router.stream_chat(CHAT, messages, max_tokens=8, timeout=30) as stream:
            pieces = [delta.content async for delta in stream]
        return "".join(pieces) == stream.response.content == expected(messages, 8)

    async def everything():
        chat = router.achat(CHAT, HELLO, max_tokens=8, timeout=30)
        vectors = router.aembed(EMBED, ["a"], timeout=30)
        answers = await asyncio.gather(chat, vectors, *(stream(number) for number in range(24)))
        assert answers[0].content == expected(HELLO, 8)
        assert len(answers[1].vectors) == 1
        assert all(answers[2:])

    asyncio.run(everything())


@pytest.mark.both_brokers
def test_a_request_for_one_node_goes_to_it_and_to_no_other(router):
    assert router.chat(CHAT, HELLO, max_tokens=1, node="sim@test", timeout=20).node == "sim@test"
    with pytest.raises(Expired, match="no host reports a node for sim@elsewhere"):
        router.chat(CHAT, HELLO, node="sim@elsewhere", timeout=0.5)


def test_an_image_travels_as_a_data_url(router, mlx):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}]
    router.chat(CHAT, messages, max_tokens=2, timeout=20)
    assert work(mlx)[-1].body["messages"][0]["content"][1]["image_url"]["url"] == "data:image/png;base64,AAAA"


REFUSED = {
    "no messages": {"messages": []},
    "messages that are a text": {"messages": "Hello"},
    "an unknown role": {"messages": [{"role": "king", "content": "Hello"}]},
    "a temperature that is text": {"messages": HELLO, "temperature": "hot"},
    "a temperature that is no number": {"messages": HELLO, "temperature": math.nan},
    "an infinite number deep inside": {"messages": HELLO, "tools": [{"a": [math.inf]}]},
    "a stop that is a number": {"messages": HELLO, "stop": 5},
    "an unknown parameter": {"messages": HELLO, "temprature": 1},
    "an adapter": {"messages": HELLO, "adapters": "lora"},
    "a picture from the network": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]
    },
    "an endless timeout": {"messages": HELLO, "timeout": math.inf},
    "no time at all": {"messages": HELLO, "timeout": 0},
    "a body beyond the limit": {"messages": [{"role": "user", "content": "x" * 9_000_000}]},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_is_sent(options):
    """The router of this test could not even send: nothing listens where its broker should be."""
    nowhere = Router(Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0"))
    with pytest.raises(InvalidRequest):
        nowhere.chat(CHAT, **options)
    nowhere.close()


@pytest.mark.parametrize("texts", [[], "", [""], [[1, 2, 3]], [1], None])
def test_an_embedding_of_nothing_or_of_token_ids_is_refused(router, texts):
    with pytest.raises(InvalidRequest):
        router.embed(EMBED, texts)


def test_a_model_is_only_used_for_what_it_can_do(router, mlx):
    seen = len(work(mlx))
    with pytest.raises(Expired):
        router.embed(CHAT, ["a"], timeout=1.5)
    with pytest.raises(UnsupportedCapability):
        router.embed(CHAT, ["a"], timeout=20, node="sim@test")
    with pytest.raises(ModelNotServed):
        router.chat("another model", HELLO, timeout=20, node="sim@test")
    assert len(work(mlx)) == seen


def test_a_name_that_is_only_like_that_of_a_served_model_has_a_lane_of_its_own(router, mlx):
    seen = len(work(mlx))
    with pytest.raises(Expired, match="no host reports a node"):
        router.chat("SIM_CHAT", HELLO, timeout=1)
    assert len(work(mlx)) == seen


def test_a_broker_that_is_not_there_is_said_within_the_connect_timeout():
    settings = Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0", router={"connect_timeout": 0.5})
    with Router(settings) as router, pytest.raises(BrokerUnavailable, match="within 0"):
        router.chat(CHAT, HELLO)


@pytest.mark.both_brokers
def test_a_broker_that_refuses_the_user_is_not_waited_for(broker):
    scheme, _, place = broker.url.partition("://")
    url = f"{scheme}://nobody:hush-hush@{place.rpartition('@')[2]}"
    settings = Settings(broker_url=url, router={"connect_timeout": 600})
    with (
        Router(settings) as router,
        pytest.raises(BrokerUnavailable, match="refuses the user") as caught,
    ):
        router.chat(CHAT, HELLO, timeout=300)
    assert not caught.value.retryable
    assert "hush" not in f"{caught.value} {caught.value.metadata}"
