"""Looks at the metrics of a host, as Prometheus does."""

import time
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

ON = {"FLEET_REGISTRY__METRICS_PORT": "0"}
"""The environment of a host that serves them, on any port."""


def metrics_url(processes):
    return processes["registry"].wait_for("serves metrics at", 10).split()[-1]


def scrape(url):
    with urlopen(url, timeout=10) as response:
        return response.read().decode()


def samples(url):
    """The values of a scrape, by name and labels."""
    families = text_string_to_metric_families(scrape(url))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def until(url, true, within=10.0):
    """The first scrape that this is true of: nodes report every second, and the broker is asked every five."""
    deadline = time.monotonic() + within
    while not true(seen := samples(url)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    return seen
