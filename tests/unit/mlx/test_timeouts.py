import socket
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext

import pytest

from fleet_worker.mlx.timeouts import ConnectionGuard, TimeoutThread

NEVER = float("inf")
LATE = 5.0
"""Longer than any of these waits takes: a reader that is not cut fails instead of waiting for ever."""


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
    """The second connection is the clock: when it is cut, the first limit of the other is long over."""
    with (
        connection() as (ours, theirs),
        connection() as (clock, _),
        watched(timeouts, ours, soon(0.2)) as guard,
        watched(timeouts, clock, soon(0.3)),
    ):
        guard.limit = NEVER
        assert clock.recv(1) == b""
        assert is_open(ours, theirs)
        assert not guard.was_cut.is_set()


def test_a_limit_that_moved_on_is_kept_in_the_end(timeouts):
    with connection() as (ours, _), watched(timeouts, ours, soon(0.2)) as guard:
        moved = guard.limit = soon(0.3)
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
        with watched(timeouts, ours, soon(0.2)) as guard:
            pass
        with watched(timeouts, clock, soon(0.3)):
            assert clock.recv(1) == b""
        assert is_open(ours, theirs)
        assert not guard.was_cut.is_set()


def test_a_failure_of_the_reader_ends_the_watch(timeouts):
    with connection() as (ours, theirs), connection() as (clock, _):
        with pytest.raises(ZeroDivisionError), watched(timeouts, ours, soon(0.2)):
            raise ZeroDivisionError
        with watched(timeouts, clock, soon(0.3)):
            assert clock.recv(1) == b""
        assert is_open(ours, theirs)


def test_a_connection_that_was_closed_meanwhile_harms_nobody(timeouts):
    with (
        connection() as (gone, _),
        connection() as (ours, _),
        watched(timeouts, gone, soon(0.1)),
        watched(timeouts, ours, soon(0.2)),
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
    """Whoever connects does not know that its time is over."""
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
    """TLS takes the socket away from the one who connected it."""
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
    """A server in a long prefill writes once every step: it learns a step earlier that nobody listens."""
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
