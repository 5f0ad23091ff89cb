"""A stream that broke off is continued by every flavour of the simulated server as if nothing had happened."""

import re
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fleet_worker.errors import ConnectionFailure, InvalidRequest, Overloaded, ProviderError, StreamInterrupted
from fleet_worker.protocol.request import Resume
from fleet_worker.simulator import CHAT_TEMPLATE, FLAVOURS, Fault, reply_tokens
from tests.mlx_clients import HELLO, said, served

TOKENS = reply_tokens(HELLO, 100)
WHOLE = "".join(TOKENS)
CONTINUING = sorted(set(FLAVOURS) - {"openai", "rapid_mlx", "mlx_vlm"})
WARM = 0.7


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(CHAT_TEMPLATE, "utf-8")
    return str(path)


@pytest.fixture
def continuing(template):
    """A simulated server whose template is known, and a client of it."""

    @contextmanager
    def started(flavour="mlx_lm", model=None, **server):
        with served(flavour, client={"model": {"chat_template": template, **(model or {})}}, **server) as both:
            yield both

    return started


def cut_at(length, whole=WHOLE, tokens=TOKENS):
    """A resume after so many characters."""
    begun = sum(len("".join(tokens[:count])) < length for count in range(len(tokens)))
    return Resume(content=whole[:length], tokens=begun)


def after(count, tokens=TOKENS):
    """A resume after so many tokens."""
    return Resume(content="".join(tokens[:count]), tokens=count)


def joined(client, resume, **params):
    """The whole answer of a continued stream, and how it ended."""
    _, rest, answer = client.stream(resume=resume, **params)
    return resume.content + (rest["content"] or ""), answer


def is_continued(request):
    return request.body["messages"][-1]["role"] == "assistant"


# --- Any cut


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.rest)])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_answer_that_was_cut_anywhere_begins_again_at_temperature_0(continuing, flavour, step):
    """Inside of tokens too; what the servers say again is not delivered again.

    The short run tries every eleventh length, others with the next flavour; the long one tries all.
    """
    lengths = range(1 + sorted(FLAVOURS).index(flavour) % step, len(WHOLE) + 1, step)
    with continuing(flavour) as (server, client):
        for length in lengths:
            text, answer = joined(client, cut_at(length))
            assert text == WHOLE
            assert (answer.finish_reason, answer.content) == ("stop", None)
        assert not any(is_continued(request) for request in server.requests)
        assert len(server.requests) == len(lengths)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("drift", [3, *(pytest.param(drift, marks=pytest.mark.rest) for drift in (0, 1, 12))])
def test_no_server_makes_another_text_of_an_answer_at_temperature_0(continuing, flavour, drift):
    """Most servers drop the space before the first word, so the text that is sent back has other tokens than the one
    that was generated, and the rest of it differs, sooner or later."""
    with continuing(flavour, drift=drift) as (_, client):
        for count in (2, 9, 15):
            assert joined(client, after(count))[0] == WHOLE
        if flavour in CONTINUING and drift > 1:
            assert joined(client, after(9), temperature=WARM)[0] != WHOLE


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.rest)])
@pytest.mark.parametrize("flavour", CONTINUING)
def test_a_warm_answer_that_was_cut_anywhere_goes_on(continuing, flavour, step):
    """Inside of tokens too."""
    lengths = range(len(TOKENS[0] + TOKENS[1]) + 1 + CONTINUING.index(flavour) % step, len(WHOLE) + 1, step)
    with continuing(flavour) as (server, client):
        for length in lengths:
            text, answer = joined(client, cut_at(length), temperature=WARM)
            assert text == WHOLE
            assert (answer.finish_reason, answer.content) == ("stop", None)
        assert all(is_continued(request) for request in server.requests)


@pytest.mark.parametrize("flavour", CONTINUING)
def test_a_warm_answer_goes_on_from_where_it_was_cut(continuing, flavour):
    with continuing(flavour) as (server, client):
        for count in range(2, len(TOKENS)):
            assert joined(client, after(count), temperature=WARM)[0] == WHOLE
        assert all(is_continued(request) for request in server.requests)


@pytest.mark.parametrize("flavour", CONTINUING)
def test_white_space_at_the_end_of_what_was_delivered_does_not_come_twice(continuing, flavour):
    """Only the first word was delivered, so none can be repeated. Most servers are sent the text without the space."""
    tokens = reply_tokens(HELLO, 32, separators=True)
    begun = [tokens[0] + " ", tokens[0]]
    with continuing(flavour, separators=True) as (_, client):
        for content in begun:
            text, _ = joined(client, Resume(content=content, tokens=1), temperature=WARM)
            assert text == "".join(tokens)


@pytest.mark.parametrize("flavour", CONTINUING)
def test_the_temperature_that_is_sent_counts(continuing, flavour):
    with continuing(flavour, model={"temperature": 0.0}) as (_, client):
        assert (
            joined(client, Resume(content="th" if WHOLE.startswith("th") else WHOLE[:2]), temperature=None)[0] == WHOLE
        )


@pytest.mark.parametrize("flavour", ["mlx_lm", "openai", "rapid_mlx", "mlx_vlm"])
def test_a_server_that_cannot_go_on_begins_again_at_temperature_0(flavour):
    """mlx_lm.server cannot continue without the chat template."""
    with served(flavour) as (server, client):
        for length in range(1, len(WHOLE) + 1, 7):
            assert joined(client, cut_at(length))[0] == WHOLE
        assert not any(is_continued(request) for request in server.requests)
        assert {request.body["max_tokens"] for request in server.requests} == {100}


@pytest.mark.parametrize("flavour", ["mlx_lm", "openai", "rapid_mlx", "mlx_vlm"])
def test_a_server_that_cannot_go_on_is_not_asked_at_another_temperature(flavour):
    """The error is retryable: another server may be able to continue."""
    with served(flavour) as (server, client):
        with pytest.raises(StreamInterrupted) as raised:
            joined(client, after(5), temperature=WARM)
        assert raised.value.retryable
        assert server.requests == []


def test_an_answer_of_which_nothing_was_delivered_begins_at_its_beginning(continuing):
    with continuing() as (server, client):
        assert joined(client, Resume())[0] == WHOLE
        assert not is_continued(server.requests[0])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("fault", ["split", "join"])
def test_the_rest_may_come_in_any_pieces(continuing, flavour, fault):
    with continuing(flavour) as (server, client):
        server.fail(Fault(fault, seconds=0, times=3))
        for count in (1, 9, 31):
            assert joined(client, after(count))[0] == WHOLE


def test_mlx_lm_is_not_sent_a_prompt_that_it_has_cached(continuing):
    """The prompt would kill it. An answer that max_tokens ended is in its cache."""
    with continuing() as (_, client):
        for count in range(1, 12):
            client.stream(max_tokens=count)
            for delivered in (count, count + 1):
                assert joined(client, after(delivered), temperature=WARM)[0] == WHOLE


def test_mlx_lm_is_not_sent_the_end_of_an_answer_as_it_may_have_cached_it(continuing):
    with continuing() as (server, client):
        joined(client, Resume(content=WHOLE[:20] + " something", tokens=5), temperature=WARM)
        prompts = [request.body["chat_template_kwargs"]["chat_template"] for request in server.requests]
        fronts = [re.search('"( +)" [+] all_messages', prompt)[1] for prompt in prompts]
        assert fronts == [" ", "  "]  # nor a prompt that is another one without its last token


# --- Its length


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_max_tokens_counts_what_was_delivered(continuing, flavour):
    """The answer has the same length and end as without the cut."""
    with continuing(flavour) as (_, client):
        _, whole, uncut = client.stream(max_tokens=20)
        tokens = reply_tokens(HELLO, 20)
        for count in range(1, len(tokens) + 1):
            text, answer = joined(client, after(count), max_tokens=20)
            assert text == whole["content"]
            assert answer.finish_reason == uncut.finish_reason == "length"
            assert answer.usage.completion_tokens == uncut.usage.completion_tokens


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("temperature", [0, WARM])
def test_an_answer_whose_tokens_are_used_up_is_over(continuing, flavour, temperature):
    with continuing(flavour) as (server, client):
        deltas, _, answer = client.stream(resume=after(20), max_tokens=20, temperature=temperature)
        assert (deltas, answer.finish_reason, answer.usage.completion_tokens) == ([], "length", 20)
        assert len(server.requests) == (not temperature)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_answer_that_came_in_more_pieces_than_tokens_goes_on(continuing, flavour):
    """A server of an unknown kind may send each character by itself."""
    with continuing(flavour) as (_, client):
        text, answer = joined(client, Resume(content=WHOLE[:30], tokens=100), max_tokens=40)
        assert (text, answer.finish_reason) == (WHOLE, "stop")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_held_back_when_a_stream_breaks_is_not_counted(continuing, flavour):
    """All tokens had arrived, and the last one might have begun a stop string."""
    stop = [TOKENS[7] + "!!"]
    with continuing(flavour) as (server, client):
        server.fail(Fault("eof", at_token=8))
        with client.open(max_tokens=8, stop=stop) as stream:
            with pytest.raises(ConnectionFailure):
                list(stream)
            assert stream.tokens == 7
        resume = Resume(content="".join(TOKENS[:7]), tokens=stream.tokens)
        temperature = WARM if flavour in CONTINUING else 0
        assert joined(client, resume, max_tokens=8, stop=stop, temperature=temperature)[0] == "".join(TOKENS[:8])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_usage_is_of_the_whole_answer(continuing, flavour):
    with continuing(flavour) as (_, client):
        for count in (3, 12, 32):
            usage = joined(client, after(count))[1].usage
            assert usage.completion_tokens == 32
            assert usage.prompt_tokens in (4, 5)  # the simulated servers count words, also of "." and "!"
            assert usage.total_tokens == usage.prompt_tokens + 32


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tokens_go_on_from_those_that_were_delivered(continuing, flavour):
    temperature = WARM if flavour in CONTINUING else 0
    with continuing(flavour) as (_, client), client.open(resume=after(12), temperature=temperature) as stream:
        counts = [(len(deltas), stream.tokens) for deltas in stream]
        assert counts[-1][1] == 32
        assert counts[0][1] == 12 + counts[0][0] or not temperature
        assert [tokens for _, tokens in counts] == sorted(tokens for _, tokens in counts)


# --- Reasoning


@pytest.mark.parametrize("tags", [False, True])
@pytest.mark.parametrize("flavour", sorted(set(FLAVOURS) - {"omni"}))
def test_an_answer_with_reasoning_begins_again_at_temperature_0(continuing, flavour, tags):
    with continuing(flavour, reasoning=["Let", " me", " see."], think_tags=tags) as (server, client):
        for thought, content in (("Let", ""), ("Let me s", ""), ("Let me see.", ""), ("Let me see.", WHOLE[:20])):
            _, rest, _ = client.stream(resume=Resume(reasoning=thought, content=content, tokens=3))
            assert thought + (rest["reasoning"] or "") == "Let me see."
            assert content + rest["content"] == WHOLE
        assert not any(is_continued(request) for request in server.requests)


@pytest.mark.parametrize("flavour", CONTINUING)
def test_a_warm_answer_with_reasoning_goes_on_with_its_visible_text(continuing, flavour):
    with continuing(flavour, reasoning=["Hm."]) as (_, client):
        _, rest, _ = client.stream(resume=Resume(reasoning="Hm.", content=WHOLE[:20], tokens=6), temperature=WARM)
        assert (rest["reasoning"], WHOLE[:20] + rest["content"]) == (None, WHOLE)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_warm_answer_cannot_go_on_with_reasoning_alone(continuing, flavour):
    with continuing(flavour) as (server, client):
        with pytest.raises(StreamInterrupted) as raised:
            client.stream(resume=Resume(reasoning="Hm", tokens=1), temperature=WARM)
        assert not raised.value.retryable
        assert server.requests == []


def test_visible_text_is_continued_as_visible_text_where_the_template_opens_the_tag(continuing):
    """The tag is closed before the text."""
    with continuing(model={"starts_in_reasoning": True}) as (server, client):
        assert joined(client, after(9), temperature=WARM)[0] == WHOLE
        template = server.requests[0].body["chat_template_kwargs"]["chat_template"]
        assert template.endswith('{{ "\\n</think>\\n\\n " + all_messages[-1]["content"] }}')


# --- Stop strings


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("temperature", [0, WARM])
def test_a_stop_string_across_the_cut_ends_the_answer_there(continuing, flavour, temperature):
    """A node holds back what may be the beginning of a stop string; one of an older version did not."""
    stop = WHOLE[30:45]
    if temperature and flavour not in CONTINUING:
        return
    with continuing(flavour) as (_, client):
        for length in range(31, 45):
            deltas, _, answer = client.stream(resume=cut_at(length), stop=[stop], temperature=temperature)
            assert (deltas, answer.finish_reason) == ([], "stop")
        assert joined(client, cut_at(30), stop=[stop], temperature=temperature)[0] == WHOLE[:30]


def test_an_answer_that_begins_again_ends_before_a_stop_string_of_which_a_part_was_delivered():
    with served("openai") as (server, client):
        server.fail(Fault("status", status=200, body=said("Hello", " ")))
        deltas, _, answer = client.stream(resume=Resume(content="Hello wor", tokens=3), stop=["world"])
        assert (deltas, answer.finish_reason) == ([], "stop")


# --- Continuations that fail


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_is_not_continued(continuing, kind):
    with continuing("vllm_batched") as (server, client):
        with pytest.raises(StreamInterrupted):
            joined(client, after(9), response_format={"type": kind})
        assert server.requests == []
        assert joined(client, after(9), response_format={"type": "text"})[0] == WHOLE


@pytest.mark.parametrize("flavour", CONTINUING)
def test_a_last_word_that_another_server_does_not_say_again_stays_as_it_was(continuing, flavour):
    """The server is asked again, to continue after that word."""
    with continuing(flavour) as (server, client):
        text, _ = joined(client, Resume(content=WHOLE[:20] + " something", tokens=5), temperature=WARM)
        assert text.startswith(WHOLE[:20] + " something")
        assert len(text) > 100
        first, second = (request.body["messages"][-1]["content"] for request in server.requests)
        assert second == WHOLE[:20] + " something"
        assert second.startswith(first)
        assert second != first


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("delivered", [WHOLE[:30] + " something", WHOLE + "!", "S" + WHOLE[1:40]])
def test_an_answer_that_begins_again_and_differs_is_interrupted(continuing, flavour, delivered):
    """Another server of the same model has other numbers, or another version. At temperature 0 no text is made up of
    two."""
    with continuing(flavour) as (_, client), client.open(resume=Resume(content=delivered, tokens=3)) as stream:
        with pytest.raises(StreamInterrupted) as raised:
            list(stream)
        assert raised.value.retryable


REFUSALS = [
    Fault("status", status=500, times=2),
    Fault("status", status=422, body='{"detail": "no"}', times=2),
    Fault("status", status=400, body={"error": "no"}, times=2),
    Fault("status", status=404, body={"error": "continue_final_message and add_generation_prompt"}, times=2),
    Fault("status", status=200, body={"error": {"message": "no", "code": 500}}, times=2),
    Fault("error_event", code=500, times=2),
    Fault("early_error", code=500, times=2),
    Fault("empty_reply", times=2),
]


@pytest.mark.parametrize("flavour", CONTINUING)
@pytest.mark.parametrize(
    "refusal",
    [REFUSALS[0], *(pytest.param(fault, marks=pytest.mark.rest) for fault in REFUSALS[1:])],
    ids=[f"{fault.kind}-{fault.status}" for fault in REFUSALS],
)
def test_a_refusal_to_go_on_is_no_error_of_the_server(continuing, flavour, refusal):
    """Whatever the server says or does not say: the next way is tried. No node counts a `StreamInterrupted`."""
    with continuing(flavour) as (server, client):
        server.fail(refusal)
        with pytest.raises(StreamInterrupted) as raised:
            joined(client, after(9), temperature=WARM)
        assert raised.value.retryable
        assert len([request for request in server.requests if request.method == "POST"]) == 2
        server.fail(replace(refusal, times=1))
        assert joined(client, after(9), temperature=WARM)[0] == WHOLE


def test_a_server_that_dies_while_it_is_asked_to_go_on_is_not_asked_again(continuing):
    with continuing("vllm_batched") as (server, client):
        server.fail(Fault("death", at_token=0))
        with pytest.raises(ConnectionFailure):
            joined(client, after(9), temperature=WARM)
        assert len(server.requests) == 1


def test_a_server_that_fails_on_the_request_itself_has_failed():
    with served("openai") as (server, client):
        server.fail(Fault("status", status=500))
        with pytest.raises(ProviderError):
            joined(client, after(9))


def test_a_refusal_in_the_middle_of_the_rest_is_one(continuing):
    """No other strategy is tried, because a part of the rest was delivered."""
    with continuing("vllm_batched", token_interval=0.005) as (server, client):
        server.fail(Fault("error_event", at_token=5, code=400))
        with pytest.raises(InvalidRequest):
            joined(client, after(9), temperature=WARM)
        assert len(server.requests) == 1


def test_an_answer_that_thinks_where_it_should_go_on_is_not_joined(continuing):
    thinking = 'data: {"choices": [{"delta": {"reasoning": "Hm"}}]}\n\n' + said("and")
    with continuing("vllm_batched") as (server, client):
        server.fail(Fault("status", status=200, body=thinking, times=2))
        with pytest.raises(StreamInterrupted):
            joined(client, after(9), temperature=WARM)


@pytest.mark.parametrize("flavour", CONTINUING)
def test_the_rest_may_break_off_too(continuing, flavour):
    with continuing(flavour) as (server, client):
        server.fail(Fault("eof", at_token=5))
        with client.open(resume=after(9), temperature=WARM) as stream:
            with pytest.raises(ConnectionFailure):
                list(stream)
            assert stream.tokens == 9 + 4  # one of the five was a repetition


def test_a_server_that_is_busy_says_so(continuing):
    with continuing("vllm_batched") as (server, client):
        server.fail(Fault("status", status=429, body="{}"))
        with pytest.raises(Overloaded):
            joined(client, after(9))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_leaving_the_rest_stops_its_server(continuing, flavour):
    with continuing(flavour, token_interval=0.01, tokens=1000) as (server, client):
        tokens = reply_tokens(HELLO, 1000, tokens=1000)
        with client.open(resume=after(9, tokens), max_tokens=1000) as stream:
            next(iter(stream))
        server.wait_for(lambda server: server.counters["running"] == 0, timeout=1)
        assert server.requests[0].generated < 100


def test_vision_models_of_mlx_openai_begin_a_new_turn_so_they_are_not_asked_to_go_on(continuing):
    with continuing("mlx_openai", model={"features": {"vision": True}}) as (server, client):
        with pytest.raises(StreamInterrupted):
            joined(client, after(9), temperature=WARM)
        assert server.requests == []


def test_omni_goes_on_with_the_callers_own_last_turn():
    with served("omni") as (server, client):
        own = {"role": "assistant", "content": "Once upon"}
        client.stream([*HELLO, own], resume=Resume(content=" a time there", tokens=3), temperature=WARM)
        assert server.requests[0].body["messages"] == [*HELLO, {**own, "content": "Once upon a time"}]
