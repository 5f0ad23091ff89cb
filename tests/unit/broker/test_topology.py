import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.broker.topology import (
    EXCHANGE,
    LANE_EXPIRES,
    digest_queue,
    direct_lane,
    lane,
    lane_queue,
    old_lane,
    priority,
    reply_name,
    reply_queue,
    route_to,
    slug,
    task_name,
    transport_of,
)
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.settings import RouterSettings

LONGEST_ROUTING_KEY = 255  # AMQP 0-9-1: a short string


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mlx-community/Qwen3-14B_4bit", "mlx-community-qwen3-14b-4bit"),
        ("all-minilm-l6-v2", "all-minilm-l6-v2"),
        ("/Users/me/models/Llama 3.2 (1B)", "users-me-models-llama-3-2-1b"),
        ("--A--B--", "a-b"),
        ("gpt.4.o", "gpt-4-o"),
    ],
)
def test_a_model_has_a_slug(model, expected):
    assert slug(model) == expected


@given(st.text())
def test_a_slug_is_made_of_lower_case_words_and_single_dashes(model):
    assert re.fullmatch(r"(?:[a-z0-9]+(?:-[a-z0-9]+)*)?", slug(model))


@given(st.text())
def test_the_slug_of_a_slug_is_itself(model):
    assert slug(slug(model)) == slug(model)


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_a_slug_does_not_care_about_case(model):
    assert slug(model.upper()) == slug(model.lower())


@given(st.text(min_size=1))
def test_the_words_of_a_lane_are_four_whatever_the_model_is_called(model):
    assert len(lane("chat", model).split(".")) == 4


def test_a_lane_names_the_work_and_a_direct_lane_the_worker():
    assert lane("stream_chat", "qwen3-14b") == "llm.fleet.stream_chat.qwen3-14b"
    assert direct_lane("local@mini-7") == "llm.fleet.node.local@mini-7"


def test_the_longest_model_name_makes_a_lane_that_rabbitmq_can_carry():
    longest = max(getattr(rule, "max_length", 0) for rule in FleetRequest.model_fields["model"].metadata)
    for letter in ("m", "M", "m-", "é", "模", "\u0130", "\ud83d\ude00"):
        name = lane("stream_chat", (letter * longest)[:longest])
        assert len(name.encode()) <= LONGEST_ROUTING_KEY
        assert re.fullmatch(r"llm\.fleet\.stream_chat\.[a-z0-9_-]+", name)


def test_a_plain_name_keeps_its_lane_and_one_like_it_gets_another():
    assert lane("chat", "qwen3-8b") == old_lane("chat", "qwen3-8b") == "llm.fleet.chat.qwen3-8b"
    assert re.fullmatch(r"llm\.fleet\.chat\.qwen3-8b_[0-9a-f]{8}", lane("chat", "qwen3:8b"))
    assert old_lane("chat", "qwen3:8b") == "llm.fleet.chat.qwen3-8b"


NAMES = [
    "qwen3:8b",
    "qwen3-8b",
    "Qwen3-8B",
    "qwen3_8b",
    "qwen3--8b",
    "-qwen3-8b",
    "qwen3.8b",
    "qwen3 8b",
    "org/qwen3-8b",
]
OTHERS = ["通义千问", "文心一言", "модель", "ΜΟΝΤΈΛΟ", "é", "e\u0301", "😀", "-", "--", "*", "#", "a.#", "a.*"]


def test_no_two_models_share_a_lane():
    names = [
        *NAMES,
        *OTHERS,
        *(lane("chat", name).rpartition(".")[2] for name in [*NAMES, *OTHERS] if name != "qwen3-8b"),
    ]
    assert len({lane("chat", name) for name in names}) == len(names)


@given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
def test_two_names_have_one_lane_only_if_they_are_the_same(one, other):
    assert (lane("chat", one) == lane("chat", other)) == (one == other)


@given(st.text(alphabet="aA-_:. ", min_size=1, max_size=4), st.text(alphabet="aA-_:. ", min_size=1, max_size=4))
def test_names_that_hardly_differ_have_different_lanes(one, other):
    assert (lane("chat", one) == lane("chat", other)) == (one == other)


@pytest.mark.parametrize("transport", ["redis", "amqp"])
def test_a_lane_is_a_queue_that_its_own_name_leads_to(transport):
    queue = lane_queue("llm.fleet.chat.m", transport)
    assert queue.name == queue.routing_key == "llm.fleet.chat.m"
    assert queue.exchange == EXCHANGE
    assert queue.exchange.type == "topic"
    assert queue.durable
    assert not queue.auto_delete
    assert queue.expires == LANE_EXPIRES
    assert queue == lane_queue("llm.fleet.chat.m", transport)


def test_a_lane_outlives_every_request_that_may_wait_in_it():
    longest = max(getattr(rule, "le", 0) for rule in RouterSettings.model_fields["max_timeout"].metadata)
    assert longest < LANE_EXPIRES


def test_rabbitmq_is_told_that_a_lane_has_priorities():
    assert lane_queue("llm.fleet.chat.m", "amqp").max_priority == 9
    assert lane_queue("llm.fleet.chat.m", "redis").max_priority is None


def test_a_task_goes_through_the_default_exchange_of_redis_and_the_topic_exchange_of_rabbitmq():
    assert route_to("llm.fleet.chat.m", "redis")["exchange_type"] == "direct"
    assert route_to("llm.fleet.chat.m", "amqp")["exchange_type"] == "topic"
    for transport in ("redis", "amqp"):
        assert route_to("llm.fleet.chat.m", transport)["queue"] == lane_queue("llm.fleet.chat.m", transport)


hosts = st.text(alphabet=st.characters(max_codepoint=0x2FF), max_size=63)
expiries = st.floats(1, 3600 * 24)


@given(hosts, expiries)
def test_both_ends_make_the_same_reply_queue_of_its_name(host, expires):
    queue = reply_queue(reply_name(host, expires))
    assert queue.expires == pytest.approx(expires, abs=0.5)
    assert queue.expires >= 1
    assert queue.durable
    assert queue.exchange.name == ""
    assert queue.name == queue.routing_key


@given(hosts, expiries)
def test_an_envelope_takes_every_reply_name(host, expires):
    name = reply_name(host, expires)
    rules = {rule.pattern for rule in FleetRequest.model_fields["reply_to"].metadata if hasattr(rule, "pattern")}
    assert [rule for rule in rules if re.search(rule, name)] == list(rules) != []
    assert len(name) <= LONGEST_ROUTING_KEY


def test_no_two_routers_share_a_reply_queue():
    assert len({reply_name("host", 120) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(("transport", "expected"), [("redis", [0, 3, 6, 9]), ("amqp", [9, 6, 3, 0])])
def test_the_urgent_goes_first_on_brokers_that_count_in_opposite_directions(transport, expected):
    assert [priority(level, transport) for level in ("critical", "high", "normal", "low")] == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h/0", "redis"),
        ("rediss://h/0", "redis"),
        ("redis://amqp:amqp@amqp/0", "redis"),
        ("amqp://h//", "amqp"),
        ("amqps://redis:redis@redis//", "amqp"),
        ("pyamqp://h//", "amqp"),
    ],
)
def test_the_scheme_of_a_broker_url_tells_its_transport(url, expected):
    assert transport_of(url) == expected


@pytest.mark.parametrize("transport", ["redis", "amqp"])
def test_digests_have_a_fanout_of_their_own_and_leave_with_their_router(transport):
    """On RabbitMQ each router has a bounded queue, which is deleted with its connection."""
    queue = digest_queue(transport)
    assert (queue.exchange.name, queue.exchange.type) == ("llm.registry.digest", "fanout")
    assert queue.exchange.delivery_mode == 1
    assert not queue.durable
    if transport == "amqp":
        assert queue.name != digest_queue(transport).name
        assert queue.exclusive
        assert queue.max_length


def test_a_task_is_named_after_its_operation():
    assert task_name("stream_chat") == "fleet.stream_chat"
