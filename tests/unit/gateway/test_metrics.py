"""What Prometheus reads of a gateway."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fleet_worker.gateway.facts import Facts
from fleet_worker.gateway.metrics import MOST_CODES, MOST_MODELS, Metrics
from fleet_worker.protocol.reply import Usage


@pytest.fixture
def metrics():
    return Metrics(dropped=lambda: 7, are_shared=lambda: True)


def value(metrics, name, **labels):
    """Return the value of a sample; None if there is none."""
    text, _ = metrics.exposition("text/plain")
    samples = [each for family in text_string_to_metric_families(text.decode()) for each in family.samples]
    found = [each.value for each in samples if each.name == name and each.labels.items() >= labels.items()]
    assert len(found) < 2 or not labels
    return found[0] if found else None


def chat(key="alice", **fields):
    return Facts(key=key, operation="chat/completions", **fields)


def test_requests_are_counted_by_key_operation_and_status(metrics):
    for status in (200, 200, 429):
        metrics.begun("alice")
        metrics.ended(chat(), status)
    labels = {"key": "alice", "operation": "chat/completions"}
    assert value(metrics, "fleet_gateway_requests_total", **labels, status="200") == 2
    assert value(metrics, "fleet_gateway_requests_total", **labels, status="429") == 1


def test_tokens_are_those_of_the_server_or_an_estimate_if_a_node_had_the_request(metrics):
    metrics.ended(chat(usage=Usage(prompt_tokens=100, completion_tokens=20), prompt_estimate=90, node="n"), 200)
    metrics.ended(chat(usage=Usage(completion_tokens=5), prompt_estimate=10, node="n"), 499)
    metrics.ended(chat(usage=Usage(total_tokens=7), prompt_estimate=10, node="n"), 200)
    metrics.ended(chat(prompt_estimate=10), 503)
    assert value(metrics, "fleet_gateway_tokens_total", key="alice", kind="prompt") == 117
    assert value(metrics, "fleet_gateway_tokens_total", key="alice", kind="completion") == 25


def test_what_met_its_cache_is_counted_by_key_and_model(metrics):
    counted = {"model": "m", "node": "n", "cache": "hit"}
    metrics.ended(chat(usage=Usage(prompt_tokens=100, cached_tokens=90), **counted), 200)
    metrics.ended(chat(usage=Usage(prompt_tokens=50, cached_tokens=0), **{**counted, "cache": "cold"}), 200)
    metrics.ended(chat(usage=Usage(prompt_tokens=7), prompt_estimate=10, model="m", node="n"), 200)
    metrics.ended(chat(usage=Usage(prompt_tokens=1, cached_tokens=-5), **counted), 200)
    metrics.ended(chat(model="m"), 503)
    assert value(metrics, "fleet_gateway_cache_total", key="alice", outcome="hit") == 2
    assert value(metrics, "fleet_gateway_cache_total", key="alice", outcome="cold") == 1
    assert value(metrics, "fleet_gateway_prompt_tokens_total", key="alice", model="m") == 151
    assert value(metrics, "fleet_gateway_cached_tokens_total", key="alice", model="m") == 90


def test_times_are_histograms(metrics):
    metrics.ended(chat(ttft=0.3, queue_wait=0.02), 200)
    metrics.ended(chat(), 200)
    assert value(metrics, "fleet_gateway_ttft_seconds_count", key="alice") == 1
    assert value(metrics, "fleet_gateway_ttft_seconds_bucket", key="alice", le="0.5") == 1
    assert value(metrics, "fleet_gateway_ttft_seconds_bucket", key="alice", le="0.25") == 0
    assert value(metrics, "fleet_gateway_queue_wait_seconds_sum", key="alice") == 0.02


def test_what_runs_is_known(metrics):
    metrics.begun("alice")
    metrics.begun("alice")
    metrics.ended(chat(), 200)
    assert value(metrics, "fleet_gateway_running", key="alice") == 1


def test_a_request_without_a_key_is_counted_under_no_name(metrics):
    metrics.ended(chat(key=None, error="invalid_api_key"), 401)
    assert value(metrics, "fleet_gateway_errors_total", key="", code="invalid_api_key") == 1


def test_strangers_cannot_make_as_many_labels_as_they_like(metrics):
    for number in range(500):
        code = "".join(chr(97 + int(digit)) for digit in str(number))
        metrics.ended(chat(error=code), 502)
    metrics.ended(chat(error="a code\nof a stranger"), 502)
    text, _ = metrics.exposition("")
    assert text.count(b"fleet_gateway_errors_total{") == MOST_CODES + 1
    assert value(metrics, "fleet_gateway_errors_total", key="alice", code="other") == 501 - MOST_CODES


def test_an_operator_with_very_many_models_gets_the_first_by_name(metrics):
    for number in range(MOST_MODELS + 5):
        metrics.ended(chat(model=f"m{number}", usage=Usage(prompt_tokens=1, cached_tokens=0)), 200)
    text, _ = metrics.exposition("")
    assert text.count(b"fleet_gateway_prompt_tokens_total{") == MOST_MODELS + 1
    assert value(metrics, "fleet_gateway_prompt_tokens_total", key="alice", model="other") == 5


def test_ledger_and_quotas_are_read_at_each_scrape(metrics):
    assert value(metrics, "fleet_gateway_ledger_dropped_total") == 7
    assert value(metrics, "fleet_gateway_quotas_shared") == 1


@pytest.mark.parametrize(
    ("accepts", "media_type"),
    [
        ("", "text/plain"),
        ("text/plain;version=0.0.4", "text/plain"),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text"),
        ("what/ever, */*", "text/plain"),
    ],
)
def test_each_client_gets_the_format_that_it_accepts(metrics, accepts, media_type):
    text, told = metrics.exposition(accepts)
    assert told.startswith(media_type)
    assert text
