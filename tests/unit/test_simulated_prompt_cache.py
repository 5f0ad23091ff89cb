"""The prompt cache of the simulated MLX server, and the time that prompts take which are not in it."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fleet_worker.simulator import Fault, SimulatedMLX, reply_tokens
from fleet_worker.simulator.prompt_cache import PromptCache
from tests.unit.test_simulator import CALL, LEFT_OPEN, TOOLS, chunks, connect, http, post, read_all, text_of

WITH_USAGE = {"stream_options": {"include_usage": True}}


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def usage(server, *messages, **body):
    """The tokens of this prompt, and how many of them were cached."""
    counts = chunks(server, messages=messages, **WITH_USAGE, **body)[-1]["usage"]
    return counts["prompt_tokens"], counts["prompt_tokens_details"]["cached_tokens"]


def answer(server, *messages, **body):
    return assistant(text_of(chunks(server, messages=messages, **body)))


def markers(messages):
    """Tokens that are no words: two of each message, and the beginning of the answer."""
    return 2 * len(messages) + 1


# --- what is kept


class Cached:
    """A key-value cache as mlx_lm handles it, without numbers."""

    nbytes = 0

    def __init__(self, trimmable):
        self._trimmable = trimmable

    def is_trimmable(self):
        return self._trimmable

    def trim(self, tokens):
        return tokens


@pytest.mark.rest
@pytest.mark.parametrize("trimmable", [True, False])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 10])
def test_it_is_the_cache_of_mlx_lm(size, trimmable):
    """Random conversations of two models, as its server handles them: the same is left to prefill, always."""
    cache = pytest.importorskip("mlx_lm.models.cache", reason="it comes with mlx-lm")
    chance = random.Random(size * 2 + trimmable)
    for _ in range(40):
        real, simulated = cache.LRUPromptCache(max_size=size), PromptCache(size, trimmable=trimmable)
        conversations = [("a", ())]
        for _ in range(60):
            model, begun = chance.choice(conversations[-6:])
            model = chance.choice("aaab") if not begun else model
            tokens = begun + tuple(chance.choices("xyz", k=chance.randint(1, 4)))
            left = real.fetch_nearest_cache(model, list(tokens))[1]
            assert simulated.match(model, tokens) == len(tokens) - len(left)
            assert len(real) == len(simulated)
            said = tokens + tuple(chance.choices("xyz", k=chance.randint(0, 3)))
            kept = [(tokens[: chance.randint(1, len(tokens))], "system"), (tokens[:-1], "user"), (said, "assistant")]
            for sequence, kind in kept:
                if sequence and chance.random() < 0.7:
                    real.insert_cache(model, list(sequence), [Cached(trimmable)], cache_type=kind)
                    simulated.insert(model, sequence, kind)
            conversations.append((model, chance.choice([said, tokens, ()])))


def test_the_oldest_goes_and_a_hit_refreshes_nothing():
    """What is a beginning of a newer sequence is no longer kept apart from it."""
    cache = PromptCache(2)
    cache.insert("m", ("a",))
    cache.insert("m", ("a", "b"))
    cache.insert("m", ("c", "d"))
    assert (len(cache), cache.match("m", ("a", "b", "z")), cache.match("other", ("a", "b", "z"))) == (2, 2, 0)
    cache.insert("m", ("e", "f"))
    assert [cache.match("m", (each, "z")) for each in "ace"] == [0, 1, 1]


def test_only_whole_sequences_of_a_model_that_cannot_be_trimmed():
    cache = PromptCache(trimmable=False)
    for kept in (("a", "b"), ("a", "b", "c", "d")):
        cache.insert("m", kept)
    assert [cache.match("m", tuple(prompt)) for prompt in ("abcx", "abcdx", "abcd", "ax")] == [2, 4, 4, 0]


# --- what a server says of it


@pytest.mark.parametrize("flavour", ["mlx_lm", "mlx_openai"])
@pytest.mark.parametrize("prefill_rate", [0, 1_000_000])
def test_the_next_turn_finds_the_last_prompt_and_its_answer(flavour, prefill_rate):
    """If the caller sends the answer back as it was."""
    asked = [system("Be brief."), user("one two three")]
    with SimulatedMLX(flavour=flavour, prefill_rate=prefill_rate) as server:
        assert usage(server, *asked, max_tokens=50) == (markers(asked) + 5, 0)
        reply = "".join(reply_tokens(asked, 50))
        before = markers(asked) + 5 + len(reply.split()) + 1
        turn = [*asked, assistant(reply), user("four")]
        assert usage(server, *turn) == (before + 4, before)
        assert usage(server, *turn) == (before + 4, before + 3)
        other = [*asked, assistant("It is."), user("four")]
        assert usage(server, *other)[1] == markers(asked) + 5
        assert server.counters["cached_tokens"] == sum(request.cached_tokens for request in server.requests)
        assert server.requests[1].prompt_tokens == before + 4


def test_tools_roles_and_parts_are_in_the_prompt():
    """Another list of tools is another beginning; a list of text parts is its text."""
    with SimulatedMLX(models=["a", "b"]) as server:
        plain, tooled = (
            usage(server, user("one two"), model="a"),
            usage(server, user("one two"), model="a", tools=TOOLS),
        )
        assert plain == (5, 0)
        assert tooled[0] > 10
        assert tooled[1] == 0
        assert usage(server, user("one two"), model="a", tools=TOOLS)[1] == tooled[0] - 1
        other = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "name": "clock"}}]
        assert usage(server, user("one two"), model="a", tools=other)[1] < 10
        assert usage(server, system("one two"), model="a")[1] == 0
        assert usage(server, user([{"type": "text", "text": "one two"}]), model="a")[1] == 4
        assert usage(server, user("one two"), model="b")[1] == 0
        assert usage(server, user("one two"), model="default_model")[1] == 4


def test_a_tool_call_that_is_sent_back_is_what_was_generated():
    with SimulatedMLX(tool_calls=[CALL]) as server:
        reply = post(server, messages=[user("weather")], tools=TOOLS, stream=False, max_tokens=100).json()
        message = reply["choices"][0]["message"]
        turn = [user("weather"), message, {"role": "tool", "tool_call_id": "1", "content": "fine"}]
        prompt, cached = usage(server, *turn, tools=TOOLS)
        assert cached == prompt - 4


def test_reasoning_is_not_in_the_next_prompt():
    """The chat template leaves it out, so that the answer after it has to be read again."""
    with SimulatedMLX(reasoning=["a", " b"]) as server:
        reply = answer(server, user("one"), max_tokens=50)
        assert usage(server, user("one"), reply, user("two"))[1] == 4


def test_a_system_prompt_is_cached_apart_from_its_question():
    """Of use only to models that cannot be trimmed. For others it is a beginning of the answered prompt."""
    for trimmable, sequences in ((True, 1), (False, 3)):
        with SimulatedMLX(trimmable=trimmable) as server:
            usage(server, system("a b c d"), user("one"))
            assert server.counters["cached_sequences"] == sequences
            assert usage(server, system("a b c d"), user("two"))[1] == 7


def test_an_interrupted_answer_leaves_its_prompt():
    """Without the last token, so that the same prompt can be asked for again."""
    with SimulatedMLX() as server:
        for seed in (None, 1):
            server.fail(Fault("eof", at_token=3))
            post(server, messages=[user("one two three")], seed=seed)
            assert usage(server, user("one two three")) == (6, 5)
            server.forget()
            assert usage(server, user("one two three")) == (6, 0)


def test_what_is_served_alone_is_cached_when_its_client_leaves():
    with SimulatedMLX(token_interval=0.005, tokens=400) as server:
        connection = connect(server, messages=[user("one two three")], seed=1, max_tokens=400)
        server.wait_for(lambda s: s.counters["generated"] > 2)
        connection.close()
        server.wait_for(lambda s: s.counters["disconnected"] == 1)
        assert server.counters["cached_sequences"] == 1
        assert usage(server, user("one two three"))[1] == 5


def test_a_whole_prompt_in_the_cache_fails_alone_and_kills_a_batch():
    """As in the real server. Here it is the beginning of a longer prompt that was interrupted; an answer that
    max_tokens ended is in `test_simulator`."""
    options = {"chat_template_kwargs": {"chat_template": LEFT_OPEN}}
    with SimulatedMLX() as server:
        server.fail(Fault("eof", at_token=0))
        post(server, messages=[user("go on"), assistant("one two")], **options)
        partial = {"messages": [user("go on"), assistant("one")], **options}
        assert post(server, seed=1, **partial).content == b""
        with pytest.raises(httpx.RemoteProtocolError):
            post(server, seed=1, stream=False, **partial)
        assert http("GET", server.base_url + "/health").status_code == 200
        assert post(server, **partial).status_code == 404
        assert http("GET", server.base_url + "/health").status_code == 503


def test_ten_sequences_or_as_many_as_it_is_told():
    """None with 0; and none after a restart."""
    for size in (10, 2, 0):
        with SimulatedMLX(prompt_cache_size=size) as server:
            for number in range(size + 1):
                usage(server, user(f"{number} b c"))
            assert server.counters["cached_sequences"] == size
            assert usage(server, user("0 b c"))[1] == (1 if size else 0)
            assert usage(server, user("0 b c"))[1] == (5 if size else 0)
            server.kill()
            server.restart()
            assert usage(server, user("0 b c"))[1] == 0


def test_a_process_forgets_when_it_is_asked_to():
    with SimulatedMLX() as server:
        usage(server, user("one two"))
        assert http("POST", server.base_url + "/simulated/forget").status_code == 200
        assert usage(server, user("one two"))[1] == 0


# --- the time that a prompt takes


def test_only_what_is_not_cached_takes_time():
    """4,000 words at 20,000 a second: 0.2 s, and nothing for the next turn."""
    long = user("word " * 4000)
    with SimulatedMLX(prefill_rate=20_000) as server:
        assert seconds(server, long) >= 0.2
        assert seconds(server, long, answer(server, long), user("and now?")) < 0.2
        server.forget()
        assert seconds(server, long) >= 0.2


@pytest.mark.rest
def test_two_prompts_share_the_machine():
    """The short one does not wait for all of the long one, which takes as much longer."""
    with SimulatedMLX(prefill_rate=1000) as server, ThreadPoolExecutor(2) as threads:
        long = threads.submit(seconds, server, user("long " * 1000))
        server.wait_for(lambda s: s.counters["prompt_tokens"] > 1000)
        assert seconds(server, user("short " * 100)) < 0.6
        assert long.result() >= 1.1


@pytest.mark.rest
def test_the_others_get_a_token_for_each_step_of_prefill():
    """And they do not catch up afterwards. A step is a quarter of a second at most: here there are three."""
    with (
        SimulatedMLX(prefill_rate=800, token_interval=0.005, tokens=4000) as server,
        connect(server, max_tokens=4000),
    ):
        server.wait_for(lambda s: s.counters["generated"] > 5)
        reader = connect(server, messages=[user("word " * 597)], max_tokens=1)
        server.wait_for(lambda s: len(s.requests) == 2)
        before = server.requests[0].generated
        read_all(reader)
        during = server.requests[0].generated - before
        assert 2 <= during <= 8
        time.sleep(0.1)
        assert server.requests[0].generated - before - during <= 25


def seconds(server, *messages):
    start = time.perf_counter()
    post(server, messages=messages, max_tokens=1)
    return time.perf_counter() - start
