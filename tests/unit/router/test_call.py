"""The last metres of an answer: from the thread that receives it to whoever reads it."""

import asyncio
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from fleet_worker.errors import InstanceUnavailable
from fleet_worker.router.call import Call, ChatStream
from fleet_worker.router.reply_buffer import ReplyBuffer
from fleet_worker.router.wakeups import Wakeups
from tests.mlx_clients import took_less_than
from tests.unit.router.test_attempts import DOWN, accepted, deltas, failure, response


def buffer_of(max_buffered=100, seconds=0.0):
    return ReplyBuffer(Wakeups(), deadline=time.monotonic() + seconds, max_buffered=max_buffered)


def test_frames_arrive_in_order_until_the_deadline():
    buffer = buffer_of()
    frames = [deltas(1, "a"), deltas(2, "b"), response(3)]
    for frame in frames:
        assert buffer.put(frame)
    assert [buffer.get() for _ in frames] == frames
    with pytest.raises(queue.Empty):
        buffer.get()


def test_more_than_its_reader_may_leave_waiting_is_not_taken_but_an_end_is():
    buffer = buffer_of(max_buffered=3)
    assert buffer.put(deltas(1, "a", "b"))
    assert buffer.put(deltas(2, "c", "d"))
    assert not buffer.put(deltas(3, "e"))
    assert buffer.put(response(4))
    buffer.get()
    assert buffer.put(deltas(5, "f"))


def test_a_reader_that_keeps_up_may_read_any_amount():
    buffer = buffer_of(max_buffered=10)
    for seq in range(1, 100):
        assert buffer.put(deltas(seq, *"12345"))
        buffer.get()


def test_an_asyncio_reader_is_woken_by_another_thread_and_by_its_deadline():
    buffer = buffer_of(seconds=0.5)

    async def read():
        reader = asyncio.create_task(buffer.aget())
        await asyncio.sleep(0)
        threading.Thread(target=buffer.put, args=(accepted(),)).start()
        assert (await reader).kind == "accepted"
        with pytest.raises(queue.Empty):
            await buffer.aget()

    asyncio.run(read())


def test_a_frame_for_an_event_loop_that_is_closed_harms_nobody():
    buffer = buffer_of()

    async def give_up():
        reader = asyncio.create_task(buffer.aget())
        await asyncio.sleep(0)
        reader.cancel()

    asyncio.run(give_up())
    buffer.put(accepted())
    assert buffer.get().kind == "accepted"


def test_who_waits_is_not_left_waiting_when_it_is_closed():
    buffer = buffer_of(seconds=60)
    threading.Timer(0.1, buffer.close).start()
    with took_less_than(5), pytest.raises(queue.Empty):
        buffer.get()

    async def read():
        threading.Timer(0.1, buffer.close).start()
        await buffer.aget()

    with took_less_than(5), pytest.raises(queue.Empty):
        asyncio.run(read())


# --- Deltas that arrived together


@pytest.fixture
def stream():
    """A stream, and its buffer."""
    buffer = buffer_of(seconds=20)
    request = SimpleNamespace(leave=lambda buffer: buffer.close(), timed_out=lambda seconds: TimeoutError())
    with ThreadPoolExecutor(1) as threads:
        yield ChatStream(Call(lambda deadline: (request, buffer), lambda: None, 20.0, threads)), buffer


def contents(batch):
    return "".join(delta.content for delta in batch)


def test_a_batch_has_all_that_has_arrived(stream):
    stream, buffer = stream
    buffer.put(deltas(1, "a", "b"))
    buffer.put(deltas(2, "c"))
    batches = stream.batches()
    assert contents(next(batches)) == "abc"
    buffer.put(deltas(3, "d"))
    assert next(stream).content == "d"
    buffer.put(deltas(4, "e", "f"))
    buffer.put(response(5))
    assert [contents(batch) for batch in batches] == ["ef"]
    assert stream.response.content == "abcdef"


def test_a_batch_of_an_asyncio_task(stream):
    stream, buffer = stream

    async def read():
        batches = []
        async for batch in stream.batches():
            batches.append(contents(batch))
            if len(batches) == 1:
                buffer.put(deltas(3, "d"))
                buffer.put(response(4))
        return batches

    buffer.put(deltas(1, "a", "b"))
    buffer.put(deltas(2, "c"))
    assert asyncio.run(read()) == ["abc", "d"]


def test_the_deltas_before_an_error_are_a_batch_and_then_it_is_raised(stream):
    stream, buffer = stream
    buffer.put(deltas(1, "a"))
    buffer.put(deltas(2, "b"))
    buffer.put(failure(3, DOWN))
    batches = stream.batches()
    assert contents(next(batches)) == "ab"
    for _ in range(2):
        with pytest.raises(InstanceUnavailable):
            next(batches)
