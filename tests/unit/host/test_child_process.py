import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fleet_worker.host.child_process import (
    KEPT_LINES,
    ChildFailed,
    ChildProcess,
    child,
    python,
)

WITHIN = 10.0
FOR_EVER = "import signal; print('up', flush=True); signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
PARENT = """
import subprocess, sys
grandchild = subprocess.Popen([sys.executable, '-S', '-c', 'import signal; signal.pause()'])
print('up', grandchild.pid, flush=True)
grandchild.wait()
"""


def code(text):
    return python("-S", "-c", text)


def has_ended(pid):
    """Asks `ps` until it says so, for two seconds: a killed process takes a moment."""
    until = time.monotonic() + 2
    while time.monotonic() < until:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
        if state.strip()[:1] in ("", "Z"):
            return True
    return False


def test_the_command_is_that_of_this_interpreter():
    assert python("-m", "celery") == [sys.executable, "-m", "celery"]


def test_a_line_is_waited_for():
    with child(
        "a", code("print('one'); print('two: ready'); import signal; print(flush=True); signal.pause()")
    ) as process:
        assert process.wait_for("ready", WITHIN) == "two: ready\n"
        assert process.wait_for(lambda line: line.startswith("o"), WITHIN) == "one\n"


def test_both_streams_are_heard():
    text = "import sys; print('out', flush=True); print('err', file=sys.stderr, flush=True); input()"
    with child("a", code(text)) as process:
        assert process.wait_for("out", WITHIN)
        assert process.wait_for("err", WITHIN)
        assert process.wait_for("EOFError", WITHIN)  # and nothing can be typed


def test_a_child_that_ends_before_it_said_so_is_a_failure_with_its_last_words():
    told = r"(?s)the node ended with exit code 78.*bad settings"
    command = code("print('bad settings'); raise SystemExit(78)")
    with child("the node", command) as process, pytest.raises(ChildFailed, match=told):
        process.wait_for("ready", WITHIN)


def test_a_child_that_ends_without_a_word_is_a_failure():
    with child("a", code("")) as process, pytest.raises(ChildFailed, match="printed nothing"):
        process.wait_for("ready", WITHIN)


def test_a_child_that_is_not_ready_in_time_is_a_failure():
    with child("the node", code(FOR_EVER)) as process:
        process.wait_for("up", WITHIN)
        started = time.monotonic()
        with pytest.raises(ChildFailed, match=r"(?s)the node was not ready within 0.1 s.*up"):
            process.wait_for("ready", 0.1)
        assert 0.1 <= time.monotonic() - started < 2


def test_what_was_said_just_before_the_end_is_heard():
    with child("a", code("print('ready')")) as process:
        assert process.wait_for("ready", WITHIN)
        assert process.wait(WITHIN) == 0
        assert process.wait_for("ready", WITHIN)
        assert process.output == "ready\n"


def test_only_the_last_lines_of_much_are_kept():
    with child("a", code(f"for n in range({KEPT_LINES} + 100): print(n)\nprint('done')")) as process:
        process.wait_for("done", WITHIN)
        assert len(process.lines) == KEPT_LINES
        assert process.lines[0] == "101\n"


def test_words_that_are_no_text_do_not_disturb():
    text = "import sys; sys.stdout.buffer.write(bytes([255, 254]) + b' odd' + bytes([10])); print('ready', flush=True)"
    with child("a", code(text)) as process:
        assert process.wait_for("ready", WITHIN)
        assert "odd" in process.output


def test_a_child_sees_the_environment_and_what_is_added(monkeypatch):
    monkeypatch.setenv("FROM_PARENT", "1")
    text = "import os; print(os.environ['FROM_PARENT'], os.environ['ADDED'])"
    with child("a", code(text), {"ADDED": "2"}) as process:
        assert process.wait_for("1", WITHIN) == "1 2\n"


def test_a_child_does_not_hear_the_ctrl_c_of_its_parent():
    with child("a", code(FOR_EVER)) as process:
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)


def test_stopping_asks_first():
    process = ChildProcess("a", code(FOR_EVER))
    process.wait_for("up", WITHIN)
    assert process.stop() == -signal.SIGTERM


def test_stopping_does_not_ask_twice():
    process = ChildProcess("a", code(DEAF))
    process.wait_for("up", WITHIN)
    started = time.monotonic()
    assert process.stop(grace=0.1) == -signal.SIGKILL
    assert time.monotonic() - started < 5


def test_a_frozen_child_is_stopped_too():
    process = ChildProcess("a", code(FOR_EVER))
    process.wait_for("up", WITHIN)
    process.signal(signal.SIGSTOP)
    assert process.stop() == -signal.SIGTERM


def test_a_child_that_has_ended_is_stopped_without_harm():
    process = ChildProcess("a", code("raise SystemExit(3)"))
    assert process.wait(WITHIN) == 3
    process.signal(signal.SIGTERM)
    assert process.stop() == 3
    assert process.stop() == 3


def test_waiting_for_the_end_has_an_end():
    with child("a", code(FOR_EVER)) as process, pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)


def test_nothing_is_left_running_when_the_block_fails():
    with pytest.raises(ChildFailed), child("a", code(FOR_EVER)) as process:
        process.wait_for("ready", 0)
    assert has_ended(process.pid)


def test_the_children_of_a_child_neither_survive_it_nor_hold_up_its_end():
    process = ChildProcess("a", code(PARENT))
    grandchild = int(process.wait_for("up", WITHIN).split()[1])
    started = time.monotonic()
    alarm = subprocess.Popen(code(f"import os, time; time.sleep(3); os.kill({grandchild}, 9)"))
    try:
        process.stop()
        assert time.monotonic() - started < 2.5
        assert has_ended(grandchild)
    finally:
        alarm.kill()
        alarm.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(grandchild, signal.SIGKILL)
