import signal
from contextlib import ExitStack, contextmanager

import pytest

from fleet_worker.demo.children import ChildLost, Children, Interrupted
from fleet_worker.host.child_process import child, python

WITHIN = 10.0
FOR_EVER = "import signal; print('up', flush=True); signal.pause()"


def code(text):
    return python("-S", "-c", text)


def interrupted(block):
    """Run `block(children)` and return what interrupted it."""
    try:
        with Children() as children:
            block(children)
    except (ChildLost, Interrupted) as reason:
        return reason
    return None


def test_the_last_that_was_entered_is_left_first():
    ended = []
    with Children() as children:
        processes = [children.start(name, code(FOR_EVER)) for name in ("one", "other")]
        using_them = ExitStack()
        using_them.callback(lambda: ended.extend(process.ended for process in processes))
        children.enter(using_them)
    assert ended == [False, False]
    assert [process.wait(0) for process in processes] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_interrupts_the_block_and_stops_the_children(number, exit_code):
    before = signal.getsignal(number)
    started = []

    def block(children):
        started.append(children.start("a", code(FOR_EVER)))
        signal.raise_signal(number)
        started.append("never")

    assert interrupted(block).exit_code == exit_code
    assert [process.ended for process in started] == [True]
    assert signal.getsignal(number) is before


def test_a_child_that_ends_interrupts_whatever_goes_on():
    started = []

    def block(children):
        started.append(children.start("the other", code(FOR_EVER)))
        children.start("the node", code("print('bad settings'); raise SystemExit(3)"))
        started[0].wait_for("never said", WITHIN)

    assert str(interrupted(block)) == "the node ended with exit code 3:\nbad settings"
    assert started[0].ended


def test_a_child_that_ends_before_anybody_knows_it_is_noticed(monkeypatch):
    @contextmanager
    def ended_child(*arguments):
        with child(*arguments) as process:
            process.wait(WITHIN)
            yield process

    monkeypatch.setattr("fleet_worker.demo.children.child", ended_child)
    reason = interrupted(lambda children: children.start("the node", code("raise SystemExit(3)")))
    assert str(reason).startswith("the node ended with exit code 3:")


def test_a_child_that_is_killed_is_said_to_be():
    def block(children):
        process = children.start("the node", code(FOR_EVER))
        process.signal(signal.SIGKILL)
        process.wait_for("never said", WITHIN)

    assert str(interrupted(block)).startswith("the node was killed by signal 9:")


def test_a_signal_while_something_starts_waits_until_it_can_be_stopped():
    """Else a process might be running whose id nobody knows."""
    seen = []

    @contextmanager
    def starting():
        signal.raise_signal(signal.SIGTERM)
        seen.append("started")
        yield
        seen.append("stopped")

    assert interrupted(lambda children: children.enter(starting())).exit_code == 143
    assert seen == ["started", "stopped"]


def test_nothing_interrupts_the_stopping():
    """Not even an impatient second Ctrl-C; a first one at this late moment is told afterwards."""
    started = []

    def block(children):
        started.append(children.start("a", code(FOR_EVER)))
        late = ExitStack()
        late.callback(signal.raise_signal, signal.SIGHUP)
        children.enter(late)

    assert interrupted(block).exit_code == 129
    assert started[0].ended


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert interrupted(lambda children: signal.raise_signal(signal.SIGHUP)) is None
    finally:
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
