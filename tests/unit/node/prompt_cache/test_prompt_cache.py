"""What a node learns from requests and their answers."""

import timeit
from contextlib import ExitStack

import pytest

from fleet_worker.mlx.chat_stream import ChatAnswer
from fleet_worker.node.prompt_cache.prompt_cache import PromptCache
from fleet_worker.protocol.cache_digest import USUAL_PREFILL_SPEED, CacheDigest
from fleet_worker.protocol.prompt_prefixes import MOST_PREFIXES, PromptPrefixes
from fleet_worker.protocol.reply import Usage
from tests.clock import Clock

BYTES = 4_000
"""Of each message."""
TOKENS = 1_000
"""Of each message: the simulated tokenizer takes four bytes for a token."""


@pytest.fixture
def clock():
    return Clock(50.0)


@pytest.fixture
def cache(clock):
    return PromptCache(3, clock=clock)


def prompt(*messages, **ids):
    """Ids have 11 characters."""
    chain = tuple((identity("".join(messages[:number])), number * BYTES) for number in range(1, len(messages) + 1))
    return PromptPrefixes(ids.get("session"), ids.get("conversation"), chain, ids.get("opening"))


def identity(text):
    return text[-11:].ljust(11, "_")


def answer(messages, cached=0, *, ttft=1.0, tokens_per_second=None, completion_tokens=20):
    usage = Usage(prompt_tokens=messages * TOKENS, cached_tokens=cached, completion_tokens=completion_tokens)
    return ChatAnswer("stop", usage, ttft, tokens_per_second)


def ask(cache, prefixes, *, cached=0, model="m", backend="b", request_id="r", **options):
    with cache.serving(request_id, model, prefixes, backend=backend) as served:
        served.first_token()
        served.answered(answer(len(prefixes.chain), cached, **options))


def digest(cache):
    return cache.digest("one@test", slots=4, running=2)


def test_a_digest_of_a_node_that_did_nothing(cache):
    told = digest(cache)
    assert (told.node, told.slots, told.running, told.held, told.prefill_left) == ("one@test", 4, 2, [], 0.0)
    assert (told.prefill_speed, told.decode_speed) == (None, None)


def test_an_answered_prompt_is_held(cache):
    ask(cache, prompt("a", "b", session="session_123"))
    assert set(digest(cache).held) == {"session_123", identity("a"), identity("ab")}


def test_a_prompt_that_is_being_read_is_not_held_yet(cache):
    with cache.serving("r", "m", prompt("a", "b")) as served:
        assert digest(cache).held == []
        served.first_token()
        assert digest(cache).held == [identity("a")]
    assert digest(cache).held == [identity("a")]  # it was cancelled


def test_what_the_server_says_corrects_what_is_believed(cache):
    ask(cache, prompt("a", "b", "c"))
    ask(cache, prompt("a", "y"))
    with cache.serving("r", "m", prompt("a", "b", "c", "d")) as served:
        assert cache._shadow.match(prompt("a", "b", "c", "x")) == 3 * BYTES
        cache._compare(served, 4 * TOKENS, 1 * TOKENS)
        assert cache._shadow.match(prompt("a", "b", "c", "x")) == 1 * BYTES


def test_what_is_nearly_what_is_believed_corrects_nothing(cache):
    """Tokens and bytes do not grow alike, and the last messages may be written in another way."""
    ask(cache, prompt("a", "b", "c"))
    with cache.serving("r", "m", prompt("a", "b", "c", "d")) as served:
        cache._compare(served, 4 * TOKENS, 2 * TOKENS)
        assert cache._shadow.match(prompt("a", "b", "c", "x")) == 3 * BYTES


def test_a_server_that_says_nothing_is_believed_to_cache(cache):
    ask(cache, prompt("a", "b"))
    ask(cache, prompt("a", "b", "c"), cached=None)
    assert cache._shadow.match(prompt("a", "b", "c")) == 3 * BYTES
    assert cache.troubles() == ()


@pytest.mark.parametrize(
    "usage",
    [
        *(Usage(), Usage(prompt_tokens=0), Usage(prompt_tokens=0, cached_tokens=9)),
        *(Usage(prompt_tokens=5, cached_tokens=2**31 - 1), Usage(prompt_tokens=2**31 - 1, cached_tokens=2**31 - 1)),
        Usage(prompt_tokens=2**31 - 1, cached_tokens=0, completion_tokens=2**31 - 1),
        Usage(prompt_tokens=300, cached_tokens=0),
    ],
)
@pytest.mark.parametrize("seconds", [None, 0.0, 1e-300, 1e6])
def test_usage_without_sense_does_no_harm(cache, usage, seconds):
    with cache.serving("r", "m", prompt("a", "b", "c")) as served:
        served.answered(ChatAnswer("stop", usage, seconds, 1e300))
    assert cache._shadow.match(prompt("a", "b", "c")) == 3 * BYTES
    most = PromptPrefixes(chain=((identity("most"), 2**24 - 1),))
    with ExitStack() as running:
        for number in range(4):
            running.enter_context(cache.serving(f"r-{number}", "m", most))
        assert CacheDigest.model_validate_json(digest(cache).model_dump_json()) == digest(cache)


def test_a_restart_empties_it_and_grows_the_epoch(cache):
    ask(cache, prompt("a", "b"))
    before = digest(cache).epoch
    cache.clear()
    assert digest(cache).held == []
    assert digest(cache).epoch > before
    cache.clear()
    assert digest(cache).epoch > before + 1


@pytest.mark.parametrize("forgets", [True, False])
def test_a_swap_empties_it_where_the_server_forgets_then(clock, forgets):
    cache = PromptCache(3, forgets_on_swap=forgets, clock=clock)
    ask(cache, prompt("a"), backend="one")
    ask(cache, prompt("b"), backend="one")
    epoch = digest(cache).epoch
    ask(cache, prompt("c"), backend="two")
    held = {identity("a"), identity("b"), identity("c")}
    assert set(digest(cache).held) == ({identity("c")} if forgets else held)
    assert digest(cache).epoch == epoch


def test_prefill_is_measured_on_what_was_not_cached(cache):
    ask(cache, prompt("a", "b", "c", "d"), cached=2 * TOKENS, ttft=10.0)
    assert digest(cache).prefill_speed == 200.0
    ask(cache, prompt("a", "b", "c", "d"), cached=4 * TOKENS - 1, ttft=0.5)  # too little to tell
    assert digest(cache).prefill_speed == 200.0


def test_what_a_silent_server_had_cached_makes_no_speed(cache):
    ask(cache, prompt("a", "b"), cached=None, ttft=10.0)
    ask(cache, prompt("a", "b", "c"), cached=None, ttft=0.1)
    assert digest(cache).prefill_speed == 200.0
    ask(cache, PromptPrefixes(), cached=None, ttft=0.1)
    assert digest(cache).prefill_speed == 200.0


def test_decoding_is_measured_on_answers_that_are_long_enough(cache):
    ask(cache, prompt("a"), tokens_per_second=500.0, completion_tokens=2)
    assert digest(cache).decode_speed is None
    ask(cache, prompt("a"), tokens_per_second=40.0)
    assert digest(cache).decode_speed == 40.0


def test_requests_that_share_the_server_do_not_lower_its_speeds(cache):
    ask(cache, prompt("a"), ttft=1.0, tokens_per_second=40.0)
    with cache.serving("r", "m", prompt("x")):
        ask(cache, prompt("b"), ttft=10.0, tokens_per_second=10.0)
    assert (digest(cache).prefill_speed, digest(cache).decode_speed) == (1000.0, 40.0)
    ask(cache, prompt("c"), ttft=10.0, tokens_per_second=10.0)
    assert (digest(cache).prefill_speed, digest(cache).decode_speed) == (910.0, 37.0)


def test_one_that_came_later_only_slows_the_rest_of_the_answer(cache):
    ask(cache, prompt("a"), ttft=1.0, tokens_per_second=40.0)
    with cache.serving("r", "m", prompt("b")) as served:
        served.first_token()
        with cache.serving("r2", "m", prompt("c")):
            served.answered(answer(1, ttft=10.0, tokens_per_second=10.0))
    assert (digest(cache).prefill_speed, digest(cache).decode_speed) == (910.0, 40.0)


def test_prefill_that_is_left_is_what_is_not_cached_at_the_speed_that_was_measured(cache, clock):
    ask(cache, prompt("a", "b"), ttft=4.0)
    with cache.serving("r", "m", prompt("a", "b", "c", "d")) as served:
        assert digest(cache).prefill_left == pytest.approx(2 * TOKENS / 500)
        clock.now += 3
        assert digest(cache).prefill_left == pytest.approx(1.0)
        served.first_token()
        assert digest(cache).prefill_left == 0
    with cache.serving("r", "m", prompt("x")):
        pass
    assert digest(cache).prefill_left == 0


def test_before_anything_was_measured_prefill_is_guessed(cache):
    with cache.serving("r", "m", prompt("a")):
        assert digest(cache).prefill_left == pytest.approx(TOKENS / USUAL_PREFILL_SPEED)


def test_a_cache_that_is_off_is_noticed(cache):
    for turn in range(1, 8):
        ask(cache, prompt(*"abcdefgh"[: turn + 1]), request_id=f"r-{turn}")
    (trouble,) = cache.troubles()
    assert (trouble.kind, trouble.model, trouble.request_id) == ("unused", "m", "r-7")


def test_a_cache_that_is_too_small_is_noticed(cache):
    """Four conversations in turn, where there is room for three."""
    for turn in range(1, 8):
        for who in "abcd":
            ask(cache, prompt(*[f"{who}{number}" for number in range(turn)]), cached=0)
    assert [each.kind for each in cache.troubles()] == ["small"]


def test_a_server_that_keeps_less_than_the_setting_says_is_noticed(cache):
    """It keeps one prompt."""
    for turn in range(1, 15):
        for who in "ab":
            ask(cache, prompt(*[f"{who}{number}" for number in range(turn)]), cached=0)
        ask(cache, prompt(*[f"b{number}" for number in range(turn)]), cached=turn * TOKENS - 1)
    assert [each.kind for each in cache.troubles()] == ["small"]


def test_a_cache_that_is_larger_than_the_setting_says_is_not_too_small(cache):
    for turn in range(1, 8):
        for who in "abcd":
            ask(cache, prompt(*[f"{who}{number}" for number in range(turn)]), cached=(turn - 1) * TOKENS)
    assert cache.troubles() == ()


def test_a_conversation_that_changes_at_its_beginning_is_noticed(cache):
    for turn in range(5):
        ids = {"conversation": "c", "opening": f"It is {turn} h"}
        ask(cache, prompt(f"It is {turn} h", "b", **ids), request_id=f"r-{turn}")
    assert [(each.kind, each.request_id) for each in cache.troubles()] == [("changing", "r-4")]


def test_a_request_costs_microseconds():
    cache = PromptCache(10)
    sessions = [[f"s{who}-{number}" for number in range(MOST_PREFIXES)] for who in range(20)]
    prompts = [prompt(*session) for session in sessions]

    def requests():
        for each in prompts:
            ask(cache, each)

    assert min(timeit.repeat(requests, number=5, repeat=5)) / 100 < 0.001
    assert min(timeit.repeat(lambda: digest(cache), number=10, repeat=3)) / 10 < 0.001
