"""Ten streams of a node fail in the same moment: those beside them do not wait."""

import re
import threading
import time

import pytest

from fleet_worker import FleetError, Router, Settings
from fleet_worker.simulator import Fault
from tests.brokers import any_broker
from tests.fleets import Fleet, conversation

FAILING, GOOD, ROUNDS = 10, 4, 8
STRIKES_AT = 60
"""The token after which they fail, of 150."""

pytestmark = [pytest.mark.rest, pytest.mark.timeout(120), any_broker]


class Reader(threading.Thread):
    """Reads a stream whose tokens are the times at which the server wrote them; notes how late each one is."""

    def __init__(self, router, fleet, of):
        super().__init__()
        self._router, self._fleet, self._of = router, fleet, of
        self.late = {}
        self.error = None
        self.start()

    def run(self):
        options = {"max_tokens": 150, "on_interrupt": "fail", "timeout": 60}
        try:
            with self._router.stream_chat(self._fleet.model, conversation(self._of), **options) as stream:
                for delta in stream:
                    written = re.findall(r"\d+\.\d{6}", delta.content or "")  # the last token has no time
                    self.late |= {float(each): time.monotonic() - float(each) for each in written}
        except FleetError as error:
            self.error = error


def delay(router, fleet, mark):
    """Seconds that the good streams were later than usual, while ten others failed."""
    readers = [Reader(router, fleet, f"good {mark} {number}") for number in range(GOOD)]
    doomed = [Reader(router, fleet, f"doomed {mark} {number}") for number in range(FAILING)]
    for reader in (*readers, *doomed):
        reader.join()
    assert all(reader.error for reader in doomed)
    assert not any(reader.error for reader in readers)
    struck = min(max(reader.late) for reader in doomed)
    late = [(written - struck, seconds) for reader in readers for written, seconds in reader.late.items()]
    usual = max(seconds for after, seconds in late if after < -0.1)
    return max(seconds for after, seconds in late if -0.1 <= after < 0.7) - usual


@pytest.mark.parametrize("kind", ["reset", "eof", "error_event", "truncate"])
def test_ten_streams_that_fail_at_once_delay_no_other(broker, kind):
    with (
        Fleet(broker.url, {"one": "vllm_batched"}, slots=16, natural=150, token_interval=0.02, stamped=True) as fleet,
        Router(Settings(broker_url=broker.url)) as router,
    ):
        fleet.wait_until_ready(router, ["one"])
        fleet.servers["one"].fail(Fault(kind, at_token=STRIKES_AT, times=None, contains="doomed"))
        delays = []
        while len(delays) < ROUNDS and min(delays, default=1.0) >= 0.05:  # the machine has other work, too
            delays.append(delay(router, fleet, len(delays)))
        print(f"{kind}: ten that fail at once make a token late by {[round(each * 1000) for each in delays]} ms")
        assert min(delays) < 0.05
