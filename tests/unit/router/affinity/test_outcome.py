"""What an answer tells of the prompt cache."""

import pytest

from fleet_worker.protocol.reply import Usage
from fleet_worker.router.affinity.outcome import outcome_of


@pytest.mark.parametrize(
    ("best", "held", "cached", "outcome"),
    [
        (0, 0, 0, "cold"),
        (99, 99, 900, "cold"),
        (800, 800, 400, "hit"),
        (800, 0, 400, "hit"),
        (800, 800, 399, "miss"),
        (800, 0, 399, "moved"),
        (800, 800, None, None),
    ],
)
def test_of_a_thousand_tokens(best, held, cached, outcome):
    assert outcome_of(Usage(prompt_tokens=1_000, cached_tokens=cached), best=best, held=held, tokens=1_000) == outcome


@pytest.mark.parametrize(("cached", "outcome"), [(20, "hit"), (0, "cold")])
def test_of_a_few_tokens_it_does_not_matter_where_they_are_cached(cached, outcome):
    assert outcome_of(Usage(prompt_tokens=40, cached_tokens=cached), best=30, held=0, tokens=40) == outcome
