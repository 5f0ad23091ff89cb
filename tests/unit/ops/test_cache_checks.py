"""What doctor says about prompt caches."""

import pytest

from fleet_worker.ops.cache_checks import prompt_caches
from fleet_worker.protocol.status import CacheTrouble, InstanceStatus


def node(*troubles, name="local"):
    status = {"status": "available", "cache_troubles": troubles}
    return InstanceStatus(host="mini", name=name, node=f"{name}@mini", **status)


def trouble(kind, **fields):
    return CacheTrouble(kind=kind, **{"model": "qwen3", "count": 3, "of": 9, "request_id": "r-7", **fields})


def test_a_fleet_without_troubles_has_no_findings():
    assert list(prompt_caches([node(), node(name="two")])) == []


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("changing", "time stamp"), ("unused", "--prompt-cache-size 10"), ("small", "larger prompt cache")],
)
def test_each_kind_is_told_with_what_to_do(kind, advice):
    (finding,) = prompt_caches([node(trouble(kind))])
    assert (finding.severity, finding.check) == ("warning", "prompt cache")
    for said in ("local@mini: ", "3 of 9 requests", "qwen3", "(last: r-7)"):
        assert said in finding.found
    assert advice in finding.advice


def test_there_is_one_finding_for_each_node_and_kind():
    troubles = [trouble("small"), trouble("changing"), trouble("small", model="other")]
    found = [each.found for each in prompt_caches([node(*troubles), node(trouble("small"), name="two")])]
    assert [each.split(":")[0] for each in found] == ["local@mini", "local@mini", "two@mini"]
    assert "other" not in " ".join(found)


def test_a_kind_of_a_newer_node_is_left_out():
    assert list(prompt_caches([node(trouble("unheard-of"))])) == []


def test_text_in_braces_is_only_text():
    (finding,) = prompt_caches([node(trouble("small", model="{of.__class__}", request_id="{0}"))])
    assert "{of.__class__}" in finding.found
    assert "{0}" in finding.found
