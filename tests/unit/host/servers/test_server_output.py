import logging
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.host.servers.server_output import (
    BURST,
    LONGEST_LINE,
    RATE,
    Allowance,
    LineSplitter,
    ServerOutput,
    as_text,
)
from tests.clock import Clock


def split(*parts):
    splitter = LineSplitter()
    return [line for part in parts for line in splitter.split(part)] + splitter.take_rest()


@given(st.lists(st.binary(max_size=50).map(lambda data: data.replace(b"\r", b"")), max_size=20))
def test_lines_are_whole_however_they_arrive(parts):
    assert split(*parts) == b"".join(parts).split(b"\n")


@given(st.lists(st.integers(0, 20_000), max_size=10))
def test_a_line_without_end_takes_little_memory(sizes):
    splitter = LineSplitter()
    for size in sizes:
        splitter.split(b"x" * size)
        assert len(splitter._begun) <= LONGEST_LINE
    assert splitter.split(b"\nnext\n")[1:] == [b"next"]


def test_of_a_progress_bar_the_last_state_remains():
    assert as_text(b"\rFetching: 10%\rFetching: 99%\r") == "Fetching: 99%"
    assert split(b"Fetching: 1%\r", b"Fetching: 2%\r", b"done\n") == [b"done", b""]


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (b"\x1b[32mINFO\x1b[0m: started", "INFO: started"),
        (b"\xff\x00\x07 caf\xc3\xa9", "��� café"),
        (b"a\x1b]0;title\x07b", "a�]0;title�b"),
        (b"x" * 9999, "x" * LONGEST_LINE),
        (b"a\tb\r", "a\tb"),
        ("two\u2028lines".encode(), "two�lines"),
    ],
)
def test_nothing_that_is_printed_can_move_the_cursor_of_a_terminal_or_forge_a_line(printed, shown):
    assert as_text(printed) == shown


def test_a_flood_is_bounded_and_told():
    clock = Clock()
    allowance = Allowance(clock)
    logged = 0
    for _ in range(100):
        clock.now += 1
        for _ in range(2000):
            if allowance.exhausted:
                allowance.leave_out(1)
            else:
                allowance.spend("x" * 100)
                logged += 150
    assert logged <= BURST + 101 * RATE
    told = allowance.take_left_out()
    assert told == 200_000 - logged / 150
    assert allowance.take_left_out() == 0


def test_what_was_left_out_is_told_once_in_a_while():
    clock = Clock()
    allowance = Allowance(clock)
    allowance.leave_out(1)
    assert allowance.take_left_out() == 0
    assert allowance.take_left_out(at_once=True) == 1
    allowance.leave_out(2)
    clock.now += 10
    assert allowance.take_left_out() == 2


@pytest.fixture
def output(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = ServerOutput("local", tmp_path / "state" / "server.out")
    yield found
    found.close()


def test_each_line_is_logged_by_the_name_of_its_instance(output, caplog):
    os.write(output.writer, b"first\nsecond")
    assert output.last_lines() == ["first", "second"]
    assert [record.getMessage() for record in caplog.records] == ["[local] first", "[local] second"]


def test_the_health_checks_of_the_node_are_not_logged(output, caplog):
    os.write(output.writer, b'127.0.0.1 - - [29/Nov/2026 10:00:00] "GET /health HTTP/1.1" 200 -\n')
    os.write(output.writer, b'INFO:     127.0.0.1:53412 - "GET /v1/models HTTP/1.1" 200 OK\n')
    os.write(output.writer, b'INFO:     127.0.0.1:53412 - "GET /health HTTP/1.1" 503 Service Unavailable\n')
    output.last_lines()
    assert [record.getMessage()[-23:] for record in caplog.records] == ["503 Service Unavailable"]


def test_secrets_are_hidden(output, caplog):
    output.begin(("hf_secret",))
    os.write(output.writer, b"token hf_secret is wrong\n")
    assert output.last_lines() == ["token *** is wrong"]
    assert "hf_secret" not in caplog.text


def test_the_lines_of_an_earlier_server_are_not_those_of_the_next(output):
    os.write(output.writer, b"old\n")
    assert output.last_lines() == ["old"]
    output.begin(())
    os.write(output.writer, b"new\n")
    assert output.last_lines() == ["new"]


def test_without_a_state_folder_it_is_logged_too(tmp_path):
    (tmp_path / "file").touch()
    output = ServerOutput("local", tmp_path / "file" / "server.out")
    os.write(output.writer, b"hello\n")
    assert output.last_lines() == ["hello"]
    output.close()


def test_what_is_no_pipe_is_replaced(tmp_path):
    path = tmp_path / "server.out"
    path.write_text("an old log")
    output = ServerOutput("local", path)
    os.write(output.writer, b"hello\n")
    assert output.last_lines() == ["hello"]
    output.close()


@pytest.mark.rest
@pytest.mark.parametrize("data", [b"0123456789 line\n" * 4096, b"x" * 65536, bytes(range(256)) * 256])
def test_a_flood_of_100_mb_a_second_takes_little_time_and_fills_no_log(output, data, caplog):
    ends = time.monotonic() + 0.4

    def flood():
        while time.monotonic() < ends:
            os.write(output.writer, data)
            time.sleep(len(data) / 100e6)

    thread = threading.Thread(target=flood)
    before = time.process_time()
    thread.start()
    thread.join()
    assert time.process_time() - before < 0.35
    assert sum(len(record.getMessage()) for record in caplog.records) < BURST + 5 * RATE
