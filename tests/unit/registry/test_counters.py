"""What a node has measured since it started."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.registry.counters import BOUNDS, Counters


def histogram(counters, name):
    return counters.report()["histograms"][name]


def test_it_begins_with_nothing():
    report = Counters().report()
    assert (report["tokens"], report["requests"], report["errors"]) == (0, {}, {})
    assert report["histograms"].keys() == BOUNDS.keys()
    for name, measured in report["histograms"].items():
        assert measured == {"buckets": [0] * (len(BOUNDS[name]) + 1), "sum": 0.0}


def test_requests_errors_and_tokens_are_counted_by_name():
    counters = Counters()
    for operation in ("chat", "embed", "chat"):
        counters.request(operation)
    for code in ("timeout", "timeout", "overloaded"):
        counters.error(code)
    counters.generated(3)
    counters.generated(0)
    counters.generated(4)
    report = counters.report()
    assert report["requests"] == {"chat": 2, "embed": 1}
    assert report["errors"] == {"timeout": 2, "overloaded": 1}
    assert report["tokens"] == counters.tokens == 7


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (0.049, 0), (0.05, 0), (0.051, 1), (0.1, 1), (240.0, 11), (240.1, 12), (1e9, 12)]
)
def test_a_bucket_holds_what_is_not_above_its_bound(seconds, bucket):
    """As Prometheus counts them: `le`."""
    counters = Counters()
    counters.request("chat", ttft_seconds=seconds)
    assert [number for number, count in enumerate(histogram(counters, "ttft_seconds")["buckets"]) if count] == [bucket]


def test_what_was_not_measured_is_not_counted():
    counters = Counters()
    counters.request("embed", ttft_seconds=None, queue_wait_seconds=0.2)
    assert sum(histogram(counters, "ttft_seconds")["buckets"]) == 0
    assert sum(histogram(counters, "queue_wait_seconds")["buckets"]) == 1


@given(st.lists(st.none() | st.floats(0, 1000), max_size=30))
def test_every_measurement_is_in_one_bucket_and_in_the_sum(values):
    counters = Counters()
    for value in values:
        counters.request("chat", tokens_per_second=value)
    measured = [value for value in values if value is not None]
    buckets = histogram(counters, "tokens_per_second")["buckets"]
    assert sum(buckets) == len(measured)
    for number, bound in enumerate(BOUNDS["tokens_per_second"]):
        assert sum(buckets[: number + 1]) == sum(value <= bound for value in measured)
    assert histogram(counters, "tokens_per_second")["sum"] == pytest.approx(sum(measured), abs=1e-5)


def test_a_report_does_not_change_with_what_comes_later():
    counters = Counters()
    counters.request("chat", ttft_seconds=1.0)
    before = counters.report()
    counters.request("chat", ttft_seconds=1.0)
    counters.error("timeout")
    assert before["requests"] == {"chat": 1}
    assert before["errors"] == {}
    assert sum(before["histograms"]["ttft_seconds"]["buckets"]) == 1


def test_many_threads_may_count_at_once():
    counters = Counters()

    def count(_):
        for _ in range(500):
            counters.request("chat", ttft_seconds=0.1)
            counters.generated(2)
            counters.error("timeout")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    report = counters.report()
    assert (report["requests"], report["errors"], report["tokens"]) == ({"chat": 4000}, {"timeout": 4000}, 8000)
    assert histogram(counters, "ttft_seconds")["buckets"][1] == 4000
