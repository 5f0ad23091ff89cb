"""What a client is told if no model of an alias can answer."""

import asyncio
from types import SimpleNamespace

import pytest

from fleet_worker.errors import FleetError, FleetSaturated, QueueTimeout
from fleet_worker.gateway.dialects.dialect import EmbedAsked
from fleet_worker.gateway.exchange import Exchange
from fleet_worker.gateway.facts import Facts
from fleet_worker.gateway.problems import Problem


def busy():
    return FleetSaturated("100 requests wait", retry_after=3.0)


def away():
    return QueueTimeout("a user is at it", by_owner=True, retry_after=60.0)


def late():
    return QueueTimeout("no node took the request")


def told(*errors):
    """Return what is told of a request to an alias whose models fail with these."""
    failing = {str(number): error() for number, error in enumerate(errors)}

    async def aembed(model, **_):
        raise failing[model]

    exchange = Exchange(SimpleNamespace(aembed=aembed), SimpleNamespace(status=None), Facts(), {}, heartbeat=1.0)
    with pytest.raises(FleetError) as caught:
        asyncio.run(exchange.run(EmbedAsked(model="any", body={}, writer=None), list(failing)))
    problem = Problem.of(caught.value)
    return problem.status, problem.retry_after, problem.may_retry


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((away,), (503, 60.0, False)),
        ((away, away), (503, 60.0, False)),
        ((busy, away), (503, 5.0, True)),
        ((busy, late, away), (503, 5.0, True)),
        ((busy, late), (503, 5.0, True)),
        ((away, busy), (429, 3.0, True)),
    ],
)
def test_a_model_that_is_only_busy_is_worth_another_try_though_the_owners_need_the_other_machines(errors, expected):
    assert told(*errors) == expected
