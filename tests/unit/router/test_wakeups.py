"""How often readers are woken."""

import asyncio
import threading

from fleet_worker.router.wakeups import Wakeups


class Reader:
    def __init__(self, task=None):
        self.task = task
        self.woken = 0

    def wake(self):
        self.woken += 1


def test_a_reader_is_woken_at_once_and_in_a_batch_once_at_its_end():
    wakeups, reader = Wakeups(), Reader()
    wakeups.wake(reader)
    assert reader.woken == 1
    with wakeups.together():
        for _ in range(3):
            wakeups.wake(reader)
        assert reader.woken == 1
    assert reader.woken == 2


def test_who_is_woken_by_another_thread_does_not_wait_for_the_end_of_a_batch():
    wakeups, reader = Wakeups(), Reader()
    with wakeups.together():
        thread = threading.Thread(target=wakeups.wake, args=(reader,))
        thread.start()
        thread.join()
        assert reader.woken == 1


def test_a_batch_that_fails_wakes_all_the_same():
    wakeups, reader = Wakeups(), Reader()
    try:
        with wakeups.together():
            wakeups.wake(reader)
            raise ConnectionError
    except ConnectionError:
        assert reader.woken == 1


def test_an_event_loop_is_woken_once_for_all_of_its_tasks(monkeypatch):
    async def wake_many():
        wakeups, loop, calls = Wakeups(), asyncio.get_running_loop(), []
        readers = [Reader((loop, asyncio.Event())) for _ in range(5)]
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *args: calls.append(args) or loop.call_soon(*args), raising=False
        )
        with wakeups.together():
            for reader in readers * 2:
                wakeups.wake(reader)
        async with asyncio.timeout(5):
            for reader in readers:
                await reader.task[1].wait()
        assert len(calls) == 1

    asyncio.run(wake_many())


def test_an_event_loop_that_is_closed_stops_nobody():
    loop = asyncio.new_event_loop()
    loop.close()
    wakeups, gone, reader = Wakeups(), Reader((loop, asyncio.Event())), Reader()
    with wakeups.together():
        wakeups.wake(gone)
        wakeups.wake(reader)
    assert reader.woken == 1
