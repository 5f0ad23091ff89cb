"""The rule in a small simulated fleet (`tests.benchmarks.affinity` has the whole table)."""

from __future__ import annotations

import pytest

from tests.benchmarks.affinity.figures import AFFINE, PRODUCT, PULL, simulate


@pytest.mark.rest
def test_conversations_find_their_warm_minis_through_four_routers() -> None:
    product, affine, pull = (
        simulate("chat", policy, seed=5, routers=4, seconds=450) for policy in (PRODUCT, AFFINE, PULL)
    )
    assert product.answered == affine.answered == pull.answered
    assert product.mean < 1.25 * affine.mean
    assert product.mean < 0.25 * pull.mean
    assert product.cached > 0.9 > pull.cached
