"""The attempts of a request: when there is another one, and what is made of the frames of each."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import redis
from kombu.exceptions import OperationalError

from fleet_worker import Router, Settings
from fleet_worker.errors import (
    BrokerUnavailable,
    Cancelled,
    Expired,
    FleetError,
    FleetSaturated,
    InstanceUnavailable,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    ProviderError,
    QueueTimeout,
    ReplyLost,
    RequestTimeout,
)
from fleet_worker.protocol.reply import Accepted, ChatResponse, Delta, Deltas, EmbedResponse, Failure
from fleet_worker.protocol.request import FleetRequest, Resume
from fleet_worker.router import attempts as attempts_module
from fleet_worker.router import in_flight as in_flight_module
from fleet_worker.router.session import Session
from tests.brokers import free_port
from tests.mlx_clients import HELLO, took_less_than, until
from tests.unit.registry.test_view import about_instance, about_model, say
from tests.unit.router.test_attempts import FACTS


def accepted():
    return Accepted, {"instance": "i", "queue_wait": 0.0}


def deltas(*texts):
    return Deltas, {"deltas": [Delta(content=text) for text in texts], "tokens": len(texts)}


def response(content=None):
    return ChatResponse, {**FACTS, "content": content, "finish_reason": "stop"}


def embedding():
    return EmbedResponse, {**FACTS, "data": ["AACAPw=="], "dimensions": 1}


def failed(error):
    facts = {"code": error.code, "message": error.message, "error_class": type(error).__name__}
    return Failure, {**facts, "retryable": error.retryable, "metadata": error.metadata}


DOWN = failed(InstanceUnavailable("it is down"))


class Fleet:
    """A router whose requests go nowhere; each attempt is answered with the frames that a test has written."""

    def __init__(self, *, max_body_bytes=1_000_000, **router):
        settings = Settings(max_body_bytes=max_body_bytes, router=router)
        self.router = Router(settings)
        self.router._registry._asked_at -= 60  # nobody has answered
        self.cancelled = []
        self.publish = self._publish
        self.session = self.router._session = Session(settings, self.router._registry)
        self.session.scheduler.start()
        self.session.is_open = True
        self.session.submitter = SimpleNamespace(
            submit=lambda request, lane, patience, prefixes: self.publish(request, lane), close=lambda: None
        )
        self.session.admission = SimpleNamespace(
            admit=lambda *_, **__: None,
            enter=lambda *_: None,
            refuse=lambda *_: None,
            accepted=lambda *_: None,
            is_queued=lambda *_: True,
            is_served=lambda _: False,
        )
        self.session.control = SimpleNamespace(tell=lambda *what: self.cancelled.append(what))
        self.answers = []
        self.requests = []
        self.nodes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.router.close()

    def _publish(self, request, lane):
        self.requests.append(request)
        self.nodes.append(lane.partition(".node.")[2] or None)
        answer = self.answers.pop(0)
        if isinstance(answer, FleetError):
            raise answer
        self.say(*answer)

    def say(self, *frames, attempt=None, first=0):
        """Let these frames arrive, as those of the attempt that was made last."""
        request = self.requests[-1]
        for seq, (kind, fields) in enumerate(frames, start=first):
            frame = kind(id=request.request_id, attempt=attempt or request.attempt, seq=seq, **fields)
            self.session.receive("n", frame)

    @property
    def attempts(self):
        return [request.attempt for request in self.requests]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(attempts_module, "_back_off", lambda attempt: 0.01)


@pytest.fixture
def fleet():
    with Fleet() as fleet:
        yield fleet


def chat(fleet, **options):
    return fleet.router.chat("m", HELLO, **options)


def achat(fleet, **options):
    return asyncio.run(fleet.router.achat("m", HELLO, **options))


def stream(fleet, seen=None, **options):
    """The whole answer of a stream; its deltas are appended to `seen` as they come."""
    with fleet.router.stream_chat("m", HELLO, **options) as stream:
        for delta in stream:
            (seen if seen is not None else []).append(delta.content)
    return stream.response


def astream(fleet, seen=None, **options):
    async def read():
        async with fleet.router.stream_chat("m", HELLO, **options) as stream:
            async for delta in stream:
                (seen if seen is not None else []).append(delta.content)
        return stream.response

    return asyncio.run(read())


STREAMS = [stream, astream]
WAYS = [chat, achat, stream, astream]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def ask(request):
    return request.param


@pytest.fixture(params=STREAMS, ids=lambda way: way.__name__)
def read(request):
    return request.param


# --- Another attempt


@pytest.mark.parametrize("before", [[], [accepted()]])
def test_what_another_node_may_answer_is_tried_again(fleet, ask, before):
    fleet.answers = [[*before, DOWN], [accepted(), response("the answer")]]
    assert ask(fleet).finish_reason == "stop"
    assert fleet.attempts == [1, 2]
    first, second = fleet.requests
    assert second == first.model_copy(update={"attempt": 2})  # the same deadline, name and reply queue


def test_the_answer_is_that_of_the_last_attempt(fleet):
    fleet.answers = [[DOWN], [accepted(), DOWN], [accepted(), response("the answer")]]
    assert chat(fleet).content == "the answer"


def test_a_stream_goes_on_with_the_deltas_of_the_last_attempt(fleet, read):
    fleet.answers = [[accepted(), DOWN], [accepted(), deltas("a", "b"), deltas("c"), response()]]
    seen = []
    assert read(fleet, seen).content == "abc"
    assert seen == ["a", "b", "c"]


def test_an_embedding_is_tried_again_too(fleet):
    fleet.answers = [[DOWN], [accepted(), embedding()]]
    assert fleet.router.embed("m", "a text").vectors == [[1.0]]
    fleet.answers = [[DOWN], [accepted(), embedding()]]
    assert asyncio.run(fleet.router.aembed("m", "a text")).vectors == [[1.0]]
    assert fleet.attempts == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "error",
    [
        InstanceUnavailable("down"),
        Overloaded("busy"),
        ProviderError("500", retryable=True),
        RequestTimeout("no content in time", retryable=True),
        ReplyLost("lost", retryable=True),
    ],
)
def test_what_is_retryable_is_said_by_the_error(fleet, ask, error):
    fleet.answers = [[accepted(), failed(error)], [accepted(), response()]]
    ask(fleet)
    assert fleet.attempts == [1, 2]


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("wrong"), ModelNotServed("other"), RequestTimeout("the deadline"), ProviderError("400")],
)
def test_what_another_node_would_refuse_too_is_not_tried_again(fleet, ask, error):
    fleet.answers = [[accepted(), failed(error)]]
    with pytest.raises(type(error), match=error.message):
        ask(fleet)
    assert fleet.attempts == [1]


def test_a_stream_goes_on_where_it_broke_off_and_says_where(fleet, read):
    fleet.answers = [[accepted(), deltas("a", "b"), DOWN], [accepted(), deltas("c"), response()]]
    seen = []
    answer = read(fleet, seen)
    assert seen == ["a", "b", None, "c"]
    assert answer.content == "abc"
    assert fleet.requests[0].resume is None
    assert fleet.requests[1].resume == Resume(content="ab", tokens=2)
    assert [(each.node, each.error, each.delivered) for each in answer.attempts] == [
        ("n", "instance_unavailable", 2),
        ("n", None, 3),
    ]


def test_a_caller_may_prefer_that_a_stream_which_broke_off_fails(fleet, read):
    fleet.answers = [[accepted(), deltas("a"), DOWN]]
    seen = []
    with pytest.raises(InstanceUnavailable):
        read(fleet, seen, on_interrupt="fail")
    assert seen == ["a"]
    assert fleet.attempts == [1]


BODY = {"model": "m", "messages": HELLO, "max_tokens": 5, "stream": True, "priority": "low", "foo": 1, "user": None}
TEXTS = {"model": "m", "input": ["a"], "encoding_format": "base64", "task": "search"}
BY_BODY = {
    "chat": lambda router: router.chat(body=BODY, priority="high"),
    "achat": lambda router: asyncio.run(router.achat(body=BODY, priority="high")),
    "stream_chat": lambda router: list(router.stream_chat(body=BODY, priority="high")),
    "embed": lambda router: router.embed(body=TEXTS, priority="high"),
    "aembed": lambda router: asyncio.run(router.aembed(body=TEXTS, priority="high")),
}


@pytest.mark.parametrize("name", BY_BODY)
def test_every_method_takes_the_body_of_a_client(fleet, name):
    is_chat = "embed" not in name
    fleet.answers = [[accepted(), response("hi") if is_chat else embedding()]]
    BY_BODY[name](fleet.router)
    (request,) = fleet.requests
    assert (request.model, request.priority) == ("m", "high")
    assert request.encode()["params"] == ({"messages": HELLO, "max_tokens": 5} if is_chat else {"input": ["a"]})


def test_if_absent_is_one_of_two_words(fleet, ask):
    with pytest.raises(InvalidRequest, match='if_absent: must be "wait" or "refuse"'):
        ask(fleet, if_absent="leave")


def test_on_interrupt_is_one_of_two_words(fleet, ask):
    with pytest.raises(InvalidRequest, match="on_interrupt"):
        ask(fleet, on_interrupt="retry")


@pytest.mark.parametrize("field", ["user", "message_context", "caller", "trace_context"])
def test_what_nodes_would_refuse_as_too_large_is_not_sent(ask, field):
    with Fleet(max_body_bytes=1024) as fleet:
        for length in range(100, 1100, 100):
            text = "x" * length
            fleet.answers = [[accepted(), failed(ModelNotServed("it is away"))]]
            with pytest.raises((InvalidRequest, ModelNotServed)) as raised:
                ask(fleet, **{field: text if field == "user" else {"of": text}})
            if "max_body_bytes" in raised.value.message:
                break
            FleetRequest.decode(fleet.requests[-1].encode(), max_bytes=1024)
        assert 1 <= len(fleet.requests) < 10


# --- Requests with a key


def test_the_same_request_with_the_same_key_is_not_sent_again(fleet, ask):
    fleet.answers = [[accepted(), response("the answer")]]
    asked = {"idempotency_key": "k", "on_interrupt": "fail", "node": "n@h", "max_tokens": 5}
    first = ask(fleet, timeout=5, **asked)
    assert ask(fleet, timeout=9, priority="high", **asked) == first
    assert fleet.attempts == [1]


@pytest.mark.parametrize(
    "other", [{"max_tokens": 6}, {"node": "n@h"}, {"instance": "local"}, {"on_interrupt": "fail"}], ids=str
)
@pytest.mark.parametrize("answered", [True, False])
def test_another_request_with_the_same_key_is_refused(fleet, other, answered):
    """Whether the first one was answered or is under way; and the text says nothing of either."""
    fleet.answers = [[accepted(), response("the answer")] if answered else []]
    with fleet.router.stream_chat("m", HELLO, idempotency_key="secret key"):
        with pytest.raises(InvalidRequest, match="idempotency_key") as refused:
            stream(fleet, idempotency_key="secret key", timeout=2, **other)
        with pytest.raises(InvalidRequest):
            fleet.router.chat("m", HELLO, idempotency_key="secret key")
    assert "secret key" not in str(refused.value)
    assert HELLO[0]["content"] not in str(refused.value)
    assert fleet.attempts == [1]


def test_a_reply_with_a_gap_that_stays_is_tried_again(fleet, read, monkeypatch):
    monkeypatch.setattr(attempts_module, "GAP_CLOSES_WITHIN", 0.01)
    fleet.answers = [[accepted()], [accepted(), deltas("b"), response()]]
    publish = fleet.publish

    def lossy(request, lane):
        publish(request, lane)
        if request.attempt == 1:
            fleet.say(deltas("lost"), first=2)
            time.sleep(0.02)
            fleet.say(deltas("lost, too"), first=3)

    fleet.publish = lossy
    assert read(fleet).content == "b"
    assert fleet.attempts == [1, 2]


# --- Bounds


@pytest.mark.parametrize("most", [1, 2, 4])
def test_there_are_no_more_attempts_than_configured(ask, most):
    with Fleet(max_attempts=most) as fleet:
        fleet.answers = [[failed(InstanceUnavailable(f"down {number}"))] for number in range(1, most + 1)]
        with pytest.raises(InstanceUnavailable, match=f"down {most}"):
            ask(fleet)
        assert fleet.attempts == list(range(1, most + 1))


def test_there_is_no_attempt_for_which_no_time_is_left(fleet, ask, monkeypatch):
    monkeypatch.setattr(attempts_module, "_back_off", lambda attempt: 30.0)
    fleet.answers = [[DOWN]]
    with took_less_than(2), pytest.raises(InstanceUnavailable):
        ask(fleet, timeout=10)
    assert fleet.attempts == [1]


def test_all_attempts_have_one_deadline(fleet, ask):
    fleet.answers = [[accepted(), DOWN], [accepted()]]
    with took_less_than(2), pytest.raises(RequestTimeout, match=r"0\.3 s"):
        ask(fleet, timeout=0.3)
    assert fleet.attempts == [1, 2]


def test_an_attempt_that_nobody_took_expires_even_if_an_earlier_one_was_taken(fleet, ask):
    fleet.answers = [[accepted(), DOWN], []]
    with pytest.raises(Expired, match="no node took the request"):
        ask(fleet, timeout=0.2)


# --- Frames of older attempts


def test_what_an_older_attempt_still_says_is_not_listened_to(fleet, read):
    fleet.answers = [[accepted(), DOWN], []]
    publish = fleet.publish

    def mixed(request, lane):
        publish(request, lane)
        if request.attempt == 2:
            fleet.say(accepted(), deltas("old"), response("old"), attempt=1)
            fleet.say(accepted(), deltas("new"))
            fleet.say(deltas("old"), DOWN, attempt=1, first=2)
            fleet.say(deltas("er"), response(), first=2)

    fleet.publish = mixed
    assert read(fleet).content == "newer"
    assert fleet.attempts == [1, 2]


def test_a_request_for_one_node_is_tried_again_on_that_node(fleet, ask):
    fleet.answers = [[DOWN], [accepted(), response()]]
    ask(fleet, node="local@mini")
    assert fleet.nodes == ["local@mini", "local@mini"]


# --- How it ends


def test_the_error_that_ended_a_stream_is_raised_every_time(fleet):
    fleet.answers = [[accepted(), failed(ProviderError("400"))]]
    with fleet.router.stream_chat("m", HELLO) as stream, took_less_than(2):
        for _ in range(3):
            with pytest.raises(ProviderError, match="400"):
                next(stream)


def test_a_broker_that_does_not_take_the_first_attempt_ends_the_request_every_time(fleet):
    fleet.answers = [BrokerUnavailable("away")]
    stream = fleet.router.stream_chat("m", HELLO, timeout=3)
    with took_less_than(2):
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                next(stream)


def test_a_broker_that_does_not_take_a_further_attempt_is_tried_until_it_does(fleet, monkeypatch):
    monkeypatch.setattr(in_flight_module, "TRY_EVERY", 0.01)
    fleet.answers = [[DOWN], *[BrokerUnavailable("away", retryable=True)] * 2, [accepted(), response("late")]]
    assert chat(fleet).content == "late"
    assert fleet.attempts == [1, 2, 2, 2]


def test_a_request_that_nobody_takes_expires_and_one_that_was_taken_times_out(fleet, ask):
    fleet.answers = [[], [accepted()]]
    with pytest.raises(Expired):
        ask(fleet, timeout=0.05)
    with pytest.raises(RequestTimeout):
        ask(fleet, timeout=0.05)
    assert fleet.attempts == [1, 1]


def test_the_whole_answer_of_a_stream_is_there_when_it_has_ended(fleet):
    fleet.answers = [[accepted(), deltas("a"), response()]]
    with fleet.router.stream_chat("m", HELLO) as stream:
        assert next(stream).content == "a"
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.response
        assert list(stream) == []
    assert stream.response.content == "a"


class Places:
    """What becomes of the place of each attempt in its lane."""

    def __init__(self, fleet):
        self.told = []
        fleet.session.admission.admit = lambda *_, **__: self.place(1)
        fleet.session.admission.enter = lambda *_: self.place(2)

    def place(self, attempt):
        def tell(word):
            return lambda now: self.told.append((attempt, word))

        return SimpleNamespace(accepted=tell("accepted"), ended=tell("ended"))


def test_each_attempt_leaves_its_place_when_it_ends(fleet):
    places = Places(fleet)
    fleet.answers = [[accepted(), DOWN], [accepted(), response("hi")]]
    chat(fleet)
    assert places.told == [(1, "accepted"), (1, "ended"), (2, "accepted"), (2, "ended")]


@pytest.mark.parametrize("answer", [[failed(ModelNotServed("gone"))], BrokerUnavailable("away")])
def test_an_attempt_that_no_node_accepts_leaves_its_place_too(fleet, answer):
    places = Places(fleet)
    fleet.answers = [answer]
    with pytest.raises(type(answer) if isinstance(answer, FleetError) else ModelNotServed):
        chat(fleet)
    assert places.told == [(1, "ended")]


def test_a_request_that_joins_another_one_leaves_its_place(fleet):
    """Both are admitted, before one of them is found to be the first."""
    places = Places(fleet)
    fleet.answers = [[accepted(), response("hi")]]
    chat(fleet, idempotency_key="k")
    places.told.clear()
    join, answers = fleet.session._answers.join, [lambda *key: None]  # the other one comes a moment later
    fleet.session._answers.join = lambda *key: (answers.pop() if answers else join)(*key)
    chat(fleet, idempotency_key="k")
    assert (places.told, len(fleet.requests)) == ([(1, "ended")], 1)


def test_a_task_that_is_surely_refused_needs_no_thread(fleet):
    over = threading.Event()
    for _ in range(20):
        fleet.router._threads.submit(over.wait, 5)
    asked = []

    def refuse(*what):
        asked.append(what)
        raise FleetSaturated("full", retry_after=1.0)

    fleet.session.admission.refuse = refuse
    for options in ({}, {"node": "local@mini-7"}):
        with took_less_than(1), pytest.raises(FleetSaturated):
            achat(fleet, max_wait=5, **options)
    over.set()
    assert asked == [(f"llm.fleet.{name}", "normal", 5.0) for name in ("chat.m", "node.local@mini-7")]


def test_nothing_keeps_a_prompt_when_its_request_has_ended(fleet):
    """What admission knows of a lane stays for long, and has not the request."""
    kept = []
    fleet.session.admission.admit = lambda *_, count_slots, **__: kept.append(count_slots)
    fleet.answers = [[accepted(), response("hi")]]
    prompt = [{"role": "user", "content": "a prompt of its own"}]
    fleet.router.chat("m", prompt)
    (count_slots,) = kept
    found, seen = [count_slots], 0
    while found and seen < 20:
        each, seen = found.pop(), seen + 1
        assert not isinstance(each, FleetRequest)
        found += [cell.cell_contents for cell in getattr(each, "__closure__", None) or ()]
        found += [part for part in getattr(each, "args", ()) if not isinstance(part, str)]
    assert count_slots() == 0


def test_a_stream_says_how_far_it_is(fleet):
    fleet.answers = [[accepted(), deltas("a", "b"), DOWN], []]
    with fleet.router.stream_chat("m", HELLO, temperature=0) as stream:
        assert next(stream).content == "a"
        assert stream.tokens == 2
        until(lambda: len(fleet.requests) == 2)
        first, *_ = stream.progress.past
        assert (first.node, first.error, first.delivered) == ("n", "instance_unavailable", 2)
        assert (stream.progress.attempt, stream.progress.node, stream.progress.queue_wait) == (2, None, None)
        fleet.say(accepted())
        assert (stream.progress.node, stream.progress.instance, stream.progress.resumed) == ("n", "i", 0)
        assert 0 <= stream.progress.queue_wait < 20
        fleet.say((Deltas, {"deltas": [Delta(content="c")], "tokens": 3}), first=1)
        assert [delta.content for delta in (next(stream), next(stream), next(stream))] == ["b", None, "c"]
        assert (stream.progress.resumed, stream.tokens) == (1, 3)
        fleet.say(failed(ModelNotServed("gone")), first=2)
        with pytest.raises(ModelNotServed):
            next(stream)
        assert (stream.progress.attempt, len(stream.progress.past), stream.tokens) == (2, 2, 3)


def test_a_stream_that_was_cancelled_keeps_its_tokens(fleet):
    fleet.answers = [[accepted(), deltas("a", "b")]]
    stream = fleet.router.stream_chat("m", HELLO)
    assert (stream.progress, stream.tokens) == (None, 0)
    with stream:
        next(stream)
    assert (stream.progress.node, stream.tokens) == ("n", 2)


def test_a_cancelled_stream_has_no_response_but_its_error(fleet):
    fleet.answers = [[accepted(), deltas("a")]]
    with fleet.router.stream_chat("m", HELLO) as stream:
        assert next(stream).content == "a"
        stream.cancel()
        with pytest.raises(Cancelled):
            _ = stream.response


def test_a_stream_that_is_left_ends_for_whoever_still_reads_it(fleet):
    fleet.answers = [[accepted()]] * 2

    async def leave():
        async with fleet.router.stream_chat("m", HELLO) as stream:
            reader = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.1)
        with pytest.raises(Cancelled):
            await reader

    with took_less_than(5):
        asyncio.run(leave())
    with took_less_than(5), ThreadPoolExecutor() as pool:
        with fleet.router.stream_chat("m", HELLO) as stream:
            reader = pool.submit(next, stream)
            time.sleep(0.1)
        with pytest.raises(Cancelled):
            reader.result()


@pytest.mark.parametrize("in_a_task", [False, True])
def test_what_is_cancelled_while_it_is_sent_is_cancelled_when_it_was_sent(fleet, in_a_task):
    fleet.answers = [[accepted()]]
    publish, sending, cancelled = fleet.publish, threading.Event(), threading.Event()

    def slowly(request, lane):
        sending.set()
        cancelled.wait(5)
        publish(request, lane)

    fleet.publish = slowly
    stream = fleet.router.stream_chat("m", HELLO)

    async def give_up():
        reader = asyncio.create_task(anext(stream))
        await asyncio.to_thread(sending.wait, 5)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        cancelled.set()

    with ThreadPoolExecutor() as pool:
        if in_a_task:
            asyncio.run(give_up())
        else:
            reader = pool.submit(next, stream)
            sending.wait(5)
            stream.cancel()
            cancelled.set()
            with pytest.raises(Cancelled):
                reader.result()
    until(lambda: not fleet.session._requests)
    assert len(fleet.cancelled) == 1


def test_threads_that_are_all_busy_with_work_of_the_caller_delay_no_request(fleet):
    fleet.answers = [[accepted(), response("the answer")]]
    over = threading.Event()

    async def ask():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        busy = asyncio.create_task(asyncio.to_thread(over.wait, 5))
        await asyncio.sleep(0)
        async with fleet.router:
            await fleet.router.achat("m", HELLO, timeout=2)
            assert not busy.done()
        over.set()
        await busy

    with took_less_than(2):
        asyncio.run(ask())


def test_what_is_about_to_be_sent_when_the_router_is_closed_is_cancelled(fleet, monkeypatch):
    monkeypatch.setattr(fleet.session.admission, "admit", lambda *_, **__: fleet.router.close())
    with took_less_than(2), pytest.raises(Cancelled, match="closed"):
        chat(fleet)
    assert fleet.requests == []
    assert fleet.session._requests == {}


def test_a_router_that_is_closed_stays_closed(fleet, ask):
    fleet.router.close()
    fleet.router.close()
    with pytest.raises(RuntimeError, match="closed"):
        ask(fleet)


def test_a_router_that_was_connected_before_a_fork_says_so(fleet, ask, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="in each process"):
        ask(fleet)
    assert fleet.requests == []
    fleet.router.close()
    assert fleet.router._session is fleet.session, "it is of the other process, which still uses it"
    monkeypatch.undo()


def test_a_request_may_wait_in_its_queue_for_as_long_as_a_caller_likes(fleet, ask):
    for seconds in (float("inf"), 10**400):  # no float is as large
        fleet.answers = [[accepted(), response("the answer")]]
        assert ask(fleet, queue_timeout=seconds).finish_reason == "stop"


def test_only_a_request_that_asks_for_it_is_refused_since_nobody_is_there(fleet):
    """And its answer may be there already."""
    answered = {"idempotency_key": "k", "if_absent": "refuse"}
    fleet.answers = [[accepted(), response("the answer")], [accepted(), response("waited for")]]
    fleet.router.chat("m", HELLO, **answered)
    say(fleet.router.registry, about_instance("i", status="away"), about_model(instance="i", status="away"))
    with pytest.raises(QueueTimeout, match="no node can take the request now"):
        fleet.router.chat("m", HELLO, if_absent="refuse")
    assert fleet.router.chat("m", HELLO, **answered).content == "the answer"
    assert fleet.router.chat("m", HELLO).content == "waited for"


def test_nothing_is_sent_before_a_stream_is_entered(fleet):
    fleet.router.stream_chat("m", HELLO)
    assert fleet.requests == []


def test_who_waits_for_another_one_to_connect_does_not_wait_for_longer():
    settings = Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0", router={"connect_timeout": 0.5})
    with Router(settings) as router, ThreadPoolExecutor(8) as pool, took_less_than(1.5):
        asked = [pool.submit(router.chat, "m", HELLO) for _ in range(8)]
        for each in asked:
            with pytest.raises(BrokerUnavailable, match=r"0\.5 s"):
                each.result()


def test_a_request_has_the_name_that_its_caller_gives_it_and_an_id_of_its_own(fleet, ask):
    fleet.answers = [[accepted(), response()]] * 2
    for _ in range(2):
        ask(fleet, request_id="r" * 128)
    ids = {request.request_id for request in fleet.requests}
    assert len(ids) == 2
    assert all(each.startswith("r" * 128 + ".") for each in ids)
    assert {request.correlation_id for request in fleet.requests} == {"r" * 128}


@pytest.mark.parametrize(
    "node", ["", "one", "@mini", "one@", "a b@mini", "one@mini/..", "*@mini", "x" * 300 + "@mini", 5, ["one@mini"]]
)
def test_what_no_node_can_be_named_is_refused_before_anything_is_sent(fleet, ask, node):
    with pytest.raises(InvalidRequest, match="name of a node"):
        ask(fleet, node=node)
    assert fleet.requests == []


@pytest.mark.parametrize(
    ("configured", "asked", "most"), [(7.0, None, 7.0), (7.0, 0, 0.0), (None, None, None), (None, 2, 2.0)]
)
def test_a_request_may_wait_as_long_as_it_says_or_as_configured(monkeypatch, configured, asked, most):
    with Fleet(max_wait=configured) as fleet:
        fleet.answers = [[accepted(), response("hi")]]
        admitted = []
        monkeypatch.setattr(fleet.session.admission, "admit", lambda *_, **how: admitted.append(how["max_wait"]))
        chat(fleet, max_wait=asked)
        assert admitted == [most]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": "60"}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_wait": -1}, "max_wait"),
        ({"max_wait": True}, "max_wait"),
        ({"max_wait": "5"}, "max_wait"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "é"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "r" * 129}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"node": "one"}, "node"),
        ({"instance": ""}, "instance"),
        ({"instance": 5}, "instance"),
        ({"on_interrupt": "retry"}, "on_interrupt"),
        ({"priority": "urgent"}, "priority"),
        ({"caller": "me"}, "caller"),
        ({"trace_context": {"a": float("inf")}}, "trace_context"),
        ({"idempotency_key": "k" * 201}, "idempotency_key"),
        ({"temperature": "hot"}, "temperature"),
    ],
    ids=str,
)
def test_every_refusal_names_the_option(fleet, ask, options, param):
    with pytest.raises(InvalidRequest) as caught:
        ask(fleet, **options)
    assert (caught.value.param, fleet.requests) == (param, [])
    assert caught.value.message.startswith(f"{param}: ")


def away():
    return Router(Settings(broker_url=f"redis://127.0.0.1:{free_port()}/0"))


def test_no_request_waits_for_a_broker_beyond_its_timeout():
    with away() as router, took_less_than(2), pytest.raises(BrokerUnavailable, match=r"within 0\.5 s") as caught:
        router.chat("m", HELLO, timeout=0.5)
    assert caught.value.retryable


def test_no_task_waits_for_a_broker_or_for_a_thread_beyond_its_timeout():
    """There are more tasks than threads, each of which would wait for a second."""

    async def ask(router):
        calls = [router.achat("m", HELLO, timeout=1) for _ in range(40)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with away() as router, took_less_than(3):
        ends = asyncio.run(ask(router))
    assert {type(end) for end in ends} <= {BrokerUnavailable, Expired}


def test_a_router_that_is_connecting_can_be_closed():
    with away() as router, ThreadPoolExecutor() as pool, took_less_than(2):
        asked = pool.submit(router.chat, "m", HELLO)
        until(lambda: router._session)
        router.close()
        with pytest.raises(Cancelled, match="closed"):
            asked.result()


@pytest.mark.parametrize("error", [OperationalError("away"), redis.exceptions.ConnectionError("cut off"), OSError()])
def test_a_broker_that_is_away_is_no_trouble_to_who_asks_for_figures(fleet, error):
    def publish(*_, **__):
        raise error

    producer = SimpleNamespace(publish=publish)
    fleet.session.submitter.producer = lambda timeout: nullcontext(producer)
    fleet.router._registry.refresh()
