"""How a request ends before its answer is complete: limits, the timer that moves them, cancellation."""

import socket
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext

import pytest

from fleet_worker.errors import Cancelled, RequestTimeout
from fleet_worker.mlx.timeouts import CancelToken, ConnectionGuard, RequestTimer, TimeoutThread
from fleet_worker.settings import ServerTimeouts
from tests.mlx_clients import WHY

NEVER = float("inf")
LATE = 5.0
"""Longer than any wait here: a reader that is not cut fails instead of waiting forever."""


def soon(seconds=0.05):
    return time.monotonic() + seconds


@contextmanager
def connection():
    """The two ends of a connection; the first is watched."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(LATE)
        theirs.settimeout(LATE)
        yield ours, theirs


@contextmanager
def watched(timeouts, connection, limit):
    guard = ConnectionGuard(limit)
    guard.attach(connection)
    with timeouts.watching(guard):
        yield guard


@pytest.fixture
def timeouts():
    thread = TimeoutThread()
    yield thread
    thread.close()


def is_open(ours, theirs):
    theirs.sendall(b"x")
    return ours.recv(1) == b"x"


def test_a_reader_of_a_silent_connection_returns_when_its_limit_has_passed(timeouts):
    with connection() as (ours, _):
        started = time.monotonic()
        with watched(timeouts, ours, started + 0.1) as guard:
            assert ours.recv(1) == b""
            assert 0.1 <= time.monotonic() - started < LATE / 2
            assert guard.was_cut.is_set()


def test_a_limit_that_has_passed_already_cuts_at_once(timeouts):
    with connection() as (ours, _), watched(timeouts, ours, soon(-1)) as guard:
        assert ours.recv(1) == b""
        assert guard.was_cut.is_set()


def test_the_other_end_sees_the_cut(timeouts):
    with connection() as (ours, theirs), watched(timeouts, ours, soon()):
        assert theirs.recv(1) == b""


def test_what_arrived_before_the_cut_is_read(timeouts):
    with connection() as (ours, theirs), watched(timeouts, ours, NEVER) as guard:
        theirs.sendall(b"last words")
        guard.limit = soon(-1)
        assert theirs.recv(1) == b""
        assert ours.recv(100) == b"last words"
        assert ours.recv(100) == b""


def test_progress_keeps_a_connection_open(timeouts):
    """When the second connection is cut, the first limit of the other has passed too."""
    with (
        connection() as (ours, theirs),
        connection() as (clock, _),
        watched(timeouts, ours, soon(0.1)) as guard,
        watched(timeouts, clock, soon(0.15)),
    ):
        guard.limit = NEVER
        assert clock.recv(1) == b""
        assert is_open(ours, theirs)
        assert not guard.was_cut.is_set()


def test_a_limit_that_moved_on_is_kept_in_the_end(timeouts):
    with connection() as (ours, _), watched(timeouts, ours, soon(0.1)) as guard:
        moved = guard.limit = soon(0.15)
        assert ours.recv(1) == b""
        assert time.monotonic() >= moved


def test_a_limit_can_come_nearer(timeouts):
    with connection() as (ours, _), watched(timeouts, ours, NEVER) as guard:
        guard.limit = soon()
        assert ours.recv(1) == b""
        assert guard.was_cut.is_set()


def test_a_near_limit_among_far_ones_is_kept(timeouts):
    with (
        connection() as (far, far_end),
        connection() as (near, _),
        watched(timeouts, far, soon(60)) as other,
        watched(timeouts, near, soon()),
    ):
        assert near.recv(1) == b""
        assert not other.was_cut.is_set()
        assert is_open(far, far_end)


def test_who_is_no_longer_watched_is_not_cut(timeouts):
    with connection() as (ours, theirs), connection() as (clock, _):
        with watched(timeouts, ours, soon(0.1)) as guard:
            pass
        with watched(timeouts, clock, soon(0.15)):
            assert clock.recv(1) == b""
        assert is_open(ours, theirs)
        assert not guard.was_cut.is_set()


def test_a_failure_of_the_reader_ends_the_watch(timeouts):
    with connection() as (ours, theirs), connection() as (clock, _):
        with pytest.raises(ZeroDivisionError), watched(timeouts, ours, soon(0.1)):
            raise ZeroDivisionError
        with watched(timeouts, clock, soon(0.15)):
            assert clock.recv(1) == b""
        assert is_open(ours, theirs)


def test_a_connection_that_was_closed_meanwhile_harms_nobody(timeouts):
    with (
        connection() as (gone, _),
        connection() as (ours, _),
        watched(timeouts, gone, soon(0.05)),
        watched(timeouts, ours, soon(0.1)),
    ):
        gone.close()
        assert ours.recv(1) == b""


def test_a_cut_from_outside_returns_the_reader_at_once(timeouts):
    with connection() as (ours, theirs), watched(timeouts, ours, NEVER) as guard:
        threading.Timer(0.05, guard.cut).start()
        assert ours.recv(1) == b""
        assert theirs.recv(1) == b""
        guard.cut()


def test_a_connection_that_is_named_after_the_cut_is_cut_at_once(timeouts):
    """The connecting thread does not know yet that the limit has passed."""
    with connection() as (ours, theirs), timeouts.watching(guard := ConnectionGuard(NEVER)):
        guard.cut()
        guard.attach(ours)
        assert theirs.recv(1) == b""


def test_only_the_connection_that_was_named_last_is_watched(timeouts):
    """A host has several addresses: the first one did not answer."""
    with connection() as first, connection() as (ours, theirs), watched(timeouts, first[0], NEVER) as guard:
        guard.attach(ours)
        guard.cut()
        assert theirs.recv(1) == b""
        assert is_open(*first)


def test_a_connection_is_cut_under_another_handle_too(timeouts):
    """TLS moves the socket into another object."""
    with connection() as (ours, theirs), watched(timeouts, ours, NEVER) as guard:
        wrapped = socket.socket(fileno=ours.detach())
        with wrapped:
            guard.cut()
            assert theirs.recv(1) == b""


def test_nothing_stays_open_when_both_have_let_go(timeouts):
    with connection() as (ours, theirs):
        with watched(timeouts, ours, NEVER):
            ours.close()
        assert theirs.recv(1) == b""


@pytest.mark.parametrize("cut", [True, False])
def test_the_first_write_to_a_connection_that_was_cut_fails(timeouts, cut):
    """A server in a long prefill writes once per step: so it notices one step earlier."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        theirs, _ = listener.accept()
        with theirs:
            with watched(timeouts, ours, NEVER) as guard:
                if cut:
                    guard.cut()
                ours.close()
            with pytest.raises((BrokenPipeError, ConnectionResetError)) if cut else nullcontext():
                theirs.sendall(b": keepalive 1/2")


def test_one_thread_watches_many_connections_each_with_its_limit(timeouts):
    before = threading.active_count()
    with ExitStack() as opened:
        pairs = [opened.enter_context(connection()) for _ in range(40)]
        guards = [
            opened.enter_context(watched(timeouts, ours, soon(0.05) if number % 2 else NEVER))
            for number, (ours, _) in enumerate(pairs)
        ]
        assert [ours.recv(1) for ours, _ in pairs[1::2]] == [b""] * 20
        assert [guard.was_cut.is_set() for guard in guards] == [False, True] * 20
        assert all(is_open(*pair) for pair in pairs[::2])
        assert threading.active_count() == before


def test_closing_ends_the_thread_and_leaves_connections_alone():
    before = set(threading.enumerate())
    timeouts = TimeoutThread()
    with connection() as (ours, theirs), watched(timeouts, ours, soon(60)) as guard:
        assert len(set(threading.enumerate()) - before) == 1
        timeouts.close()
        assert set(threading.enumerate()) <= before
        assert not guard.was_cut.is_set()
        assert is_open(ours, theirs)


def test_a_timeout_thread_is_closed_twice_without_harm(timeouts):
    timeouts.close()
    timeouts.close()


# --- The timer of a request


@pytest.fixture
def timer_of(timeouts):
    def timer(seconds=60.0, token=None, **clocks):
        return RequestTimer(timeouts, ServerTimeouts(**clocks), time.monotonic() + seconds, token)

    return timer


def running(timer, ours):
    timer.guard.attach(ours)
    return timer.running()


@pytest.mark.parametrize(
    ("seconds", "clocks", "text", "retryable"),
    [
        (60.0, {"first_content": 0.05, "gap": 0.05}, "first_content", True),
        (0.05, {"first_content": 60, "gap": 60}, "deadline", False),
    ],
)
def test_a_timer_says_which_limit_a_request_reached(timer_of, seconds, clocks, text, retryable):
    timer = timer_of(seconds, **clocks)
    with connection() as (ours, _), running(timer, ours):
        assert ours.recv(1) == b""
        with pytest.raises(RequestTimeout, match=text) as raised:
            timer.check()
        assert raised.value.retryable is retryable


def test_the_gap_counts_from_the_chunk_that_was_consumed_last(timer_of, timeouts):
    timer = timer_of(first_content=60, gap=0.05)
    with connection() as (ours, _), running(timer, ours):
        assert timer.content_received() == timeouts.last_content
        time.sleep(0.15)  # the reader is busy: this is not the silence of the server
        timer.restart_gap()
        assert ours.recv(1) == b""
        with pytest.raises(RequestTimeout, match="gap"):
            timer.restart_gap()


def test_before_the_first_content_no_chunk_gives_more_time(timer_of):
    timer = timer_of(first_content=0.1, gap=0.1)
    with connection() as (ours, _), running(timer, ours):
        limit = timer.guard.limit
        timer.restart_gap()
        assert timer.guard.limit == limit


def test_the_rest_of_a_response_may_have_less_time(timer_of):
    timer = timer_of()
    with connection() as (ours, _), running(timer, ours):
        timer.limit_rest(0.05)
        assert ours.recv(1) == b""


def test_a_cancelled_request_is_cut_and_says_why(timer_of):
    timer = timer_of(token=(token := CancelToken()))
    with connection() as (ours, _), running(timer, ours):
        token.cancel(WHY)
        assert ours.recv(1) == b""
        assert timer.error is WHY
    with pytest.raises(Cancelled), timer_of(token=token).running():
        pytest.fail("it has begun")


def test_a_deadline_that_has_passed_begins_nothing(timer_of):
    with pytest.raises(RequestTimeout), timer_of(-1).running():
        pytest.fail("it has begun")


# --- Cancellation


def test_a_callback_is_called_once_and_the_first_reason_counts():
    token, calls = CancelToken(), []
    with token.on_cancel(lambda: calls.append(threading.current_thread())):
        assert (token.error, calls) == (None, [])
        token.cancel(WHY)
        token.cancel(Cancelled("again"))
    assert token.error is WHY
    assert calls == [threading.current_thread()]


def test_nested_callbacks_are_called_together_and_the_outer_one_also_after_the_inner_one():
    calls = []
    for at_once in (True, False):
        token = CancelToken()
        with token.on_cancel(lambda: calls.append("outer")):
            with token.on_cancel(lambda: calls.append("inner")):
                if at_once:
                    token.cancel(WHY)
            token.cancel(WHY)
    assert calls == ["outer", "inner", "outer"]


def test_what_was_cancelled_before_does_not_begin():
    token = CancelToken()
    token.cancel(WHY)
    with pytest.raises(Cancelled) as raised, token.on_cancel(lambda: pytest.fail("nothing waits")):
        pytest.fail("it has begun")
    assert raised.value is WHY


def test_no_callback_is_called_after_its_block():
    token = CancelToken()
    with pytest.raises(ZeroDivisionError), token.on_cancel(lambda: pytest.fail("it has ended")):
        raise ZeroDivisionError
    token.cancel(WHY)
