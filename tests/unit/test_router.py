"""The attempts of a request: when there is another one, and what is made of the frames of each."""

import asyncio
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import redis
from kombu.exceptions import OperationalError

from fleet_worker import Router, Settings
from fleet_worker import call as call_module
from fleet_worker.errors import (
    BrokerUnavailable,
    Expired,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    ModelNotServed,
    Overloaded,
    ProviderError,
    ReplyLost,
    RequestTimeout,
)
from fleet_worker.frames import Accepted, ChatResponse, Delta, Deltas, EmbedResponse, Failure, Timings, Usage
from fleet_worker.lanes import reply_name
from fleet_worker.replies import ReplyInbox
from tests.clients import HELLO, took_less_than

FACTS = {
    "node": "n",
    "instance": "i",
    "model": "m",
    "usage": Usage(),
    "timings": Timings(queue_wait=0.0, duration=1.0),
}


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

    def __init__(self, **router):
        self.router = Router(Settings(router=router))
        self.router._registry._asked_at -= 60  # nobody has answered
        self.router._inbox = self.inbox = ReplyInbox(None, reply_name("test", 60), max_buffered=100)
        self.router._publish = self._publish
        self.answers = []
        self.requests = []
        self.nodes = []
        self.mailboxes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.router.close()

    def _publish(self, request, node):
        self.requests.append(request)
        self.nodes.append(node)
        self.mailboxes.append(self.inbox._mailboxes[request.request_id])
        answer = self.answers.pop(0)
        if isinstance(answer, FleetError):
            raise answer
        self.say(*answer)

    def say(self, *frames, attempt=None, first=0):
        """Let these frames arrive, as those of the attempt that was made last."""
        request = self.requests[-1]
        for seq, (kind, fields) in enumerate(frames, start=first):
            frame = kind(id=request.request_id, attempt=attempt or request.attempt, seq=seq, **fields)
            self.mailboxes[-1].put("n", frame)

    @property
    def attempts(self):
        return [request.attempt for request in self.requests]


@pytest.fixture
def fleet(monkeypatch):
    monkeypatch.setattr(call_module, "RETRY_AFTER", 0.01)
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
    assert fleet.mailboxes[0] is not fleet.mailboxes[1]
    assert fleet.mailboxes[1].attempt == 2


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


def test_nothing_is_tried_again_once_a_part_of_the_answer_was_seen(fleet, read):
    fleet.answers = [[accepted(), deltas("a"), DOWN]]
    seen = []
    with pytest.raises(InstanceUnavailable):
        read(fleet, seen)
    assert seen == ["a"]
    assert fleet.attempts == [1]


def test_a_reply_with_a_gap_is_tried_again_if_nothing_of_it_was_seen(fleet, read):
    fleet.answers = [[accepted()], [accepted(), deltas("b"), response()]]
    publish = fleet.router._publish

    def lossy(request, node):
        publish(request, node)
        if request.attempt == 1:
            fleet.say(deltas("lost"), first=2)

    fleet.router._publish = lossy
    assert read(fleet).content == "b"
    assert fleet.attempts == [1, 2]


# --- Bounds


@pytest.mark.parametrize("most", [1, 2, 4])
def test_there_are_no_more_attempts_than_configured(monkeypatch, ask, most):
    monkeypatch.setattr(call_module, "RETRY_AFTER", 0.001)
    with Fleet(max_attempts=most) as fleet:
        fleet.answers = [[failed(InstanceUnavailable(f"down {number}"))] for number in range(1, most + 1)]
        with pytest.raises(InstanceUnavailable, match=f"down {most}"):
            ask(fleet)
        assert fleet.attempts == list(range(1, most + 1))


def test_there_is_no_attempt_for_which_no_time_is_left(fleet, ask, monkeypatch):
    monkeypatch.setattr(call_module, "RETRY_AFTER", 30.0)
    fleet.answers = [[DOWN]]
    with took_less_than(2), pytest.raises(InstanceUnavailable):
        ask(fleet, timeout=10)
    assert fleet.attempts == [1]


def test_the_pause_before_an_attempt_doubles_and_is_not_the_same_for_all(monkeypatch):
    pauses = []
    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=pauses.append)
    monkeypatch.setattr(call_module, "time", clock)
    with Fleet(max_attempts=4) as fleet:
        for _ in range(10):
            fleet.answers = [[DOWN]] * 4
            with pytest.raises(InstanceUnavailable):
                chat(fleet)
    for attempt in range(3):
        longest = call_module.RETRY_AFTER * 2**attempt
        assert all(longest / 2 <= pause <= longest for pause in pauses[attempt::3])
        assert len(set(pauses[attempt::3])) == 10


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
    publish = fleet.router._publish

    def mixed(request, node):
        publish(request, node)
        if request.attempt == 2:
            fleet.say(accepted(), deltas("old"), response("old"), attempt=1)
            fleet.say(accepted(), deltas("new"))
            fleet.say(deltas("old"), DOWN, attempt=1, first=2)
            fleet.say(deltas("er"), response(), first=2)

    fleet.router._publish = mixed
    assert read(fleet).content == "newer"
    assert fleet.attempts == [1, 2]


def test_the_mailbox_of_an_older_attempt_is_closed(fleet):
    fleet.answers = [[accepted(), DOWN], [accepted(), response("new")]]
    assert chat(fleet).content == "new"
    old, new = fleet.mailboxes
    for mailbox in (old, new):
        mailbox.put("n", Deltas(id="r", attempt=mailbox.attempt, seq=mailbox._next_seq, deltas=[], tokens=0))
        assert mailbox._frames.empty()


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


@pytest.mark.parametrize("answers", [[BrokerUnavailable("away")], [[DOWN], BrokerUnavailable("away")]])
def test_a_broker_that_does_not_take_an_attempt_ends_the_request_every_time(fleet, answers):
    fleet.answers = answers
    stream = fleet.router.stream_chat("m", HELLO, timeout=3)
    with took_less_than(2):
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                next(stream)


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


def test_nothing_is_sent_before_a_stream_is_entered(fleet):
    fleet.router.stream_chat("m", HELLO)
    assert fleet.requests == []


@pytest.mark.parametrize("error", [OperationalError("away"), redis.exceptions.ConnectionError("cut off"), OSError()])
def test_a_broker_that_is_away_is_no_trouble_to_who_asks_for_figures(fleet, error, monkeypatch):
    def publish(*_, **__):
        raise error

    pool = SimpleNamespace(acquire=lambda block: nullcontext(SimpleNamespace(publish=publish)))
    monkeypatch.setattr(fleet.router, "_app", SimpleNamespace(producer_pool=pool, close=fleet.router._app.close))
    fleet.router._registry.refresh()
