import json

import pytest

from fleet_worker.broker.queue_depth import Waiting
from fleet_worker.ops.snapshot import snapshot_of
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.offered import Offered

NOW = 1000.0
CHAT, EMBED = "llm.fleet.chat.m", "llm.fleet.embed.m"


def instance(name="local", host="mini-7", **fields):
    known = {
        "status": "available",
        "reason": "",
        "server": "mlx_lm",
        "server_stage": "serving",
        "server_restarts": 1,
        "server_deaths": 0,
        "server_memory": 9_000_000_000,
        "version": "0.1.0",
        "slots": 4,
        "running": 1,
        "tokens_per_second": 31.25,
        "last_token_age": 0.5,
        "prompt_tokens": 900,
        "cached_tokens": 600,
        "lanes": (CHAT,),
        "heard_at": NOW - 2,
        "expires_at": NOW + 43,
    }
    return InstanceStatus(host=host, name=name, node=f"{name}@{host}", **{**known, **fields})


def offered(by, model="m", *, ready=True):
    return Offered(model, ("chat",), ("tools",), {"context_window": 4096}, ready, by)


def test_its_keys_are_those_that_are_documented():
    mini = instance()
    seen = snapshot_of([mini], [offered(mini)], {CHAT: Waiting(3, 1.23456)}, now=NOW)
    assert json.loads(json.dumps(seen.as_json())) == {
        "instances": [
            {
                "host": "mini-7",
                "instance": "local",
                "node": "local@mini-7",
                "status": "available",
                "reason": "",
                "ready": True,
                "models": ["m"],
                "lanes": [CHAT],
                "slots": 4,
                "used": 1,
                "free": 3,
                "tokens_per_second": 31.25,
                "last_token_age": 2.5,
                "prompt_tokens": 900,
                "cached_tokens": 600,
                "server": "mlx_lm",
                "server_stage": "serving",
                "server_restarts": 1,
                "server_deaths": 0,
                "server_memory": 9_000_000_000,
                "version": "0.1.0",
                "heard_age": 2.0,
                "clock_ahead": 0.0,
            }
        ],
        "models": [
            {
                "model": "m",
                "host": "mini-7",
                "instance": "local",
                "node": "local@mini-7",
                "ready": True,
                "capabilities": ["chat"],
                "features": ["tools"],
                "limits": {"context_window": 4096},
            }
        ],
        "lanes": [{"lane": CHAT, "depth": 3, "oldest_age": 1.235, "nodes": 1, "unserved": False}],
    }


def test_a_token_grows_older_since_its_host_was_heard():
    seen = snapshot_of([instance(last_token_age=10.0, heard_at=NOW - 15)], [], {}, now=NOW)
    (printed,) = seen.as_json()["instances"]
    assert (printed["last_token_age"], printed["heard_age"]) == (25.0, 15.0)
    assert seen.token_age(seen.instances[0]) == 25.0


def test_an_instance_that_delivered_nothing_yet_has_no_age_of_a_token():
    seen = snapshot_of([instance(last_token_age=None)], [], {}, now=NOW)
    assert seen.as_json()["instances"][0]["last_token_age"] is None


def test_free_slots_are_never_negative():
    """More requests may run for a while after the limit was lowered."""
    assert snapshot_of([instance(slots=1, running=3)], [], {}, now=NOW).as_json()["instances"][0]["free"] == 0


def test_models_belong_to_their_own_instance():
    here, there, other = instance(), instance(host="mini-8"), instance("other")
    models = [offered(there, "b"), offered(here, "a", ready=False), offered(here, "b")]
    seen = snapshot_of([here, other, there], models, {}, now=NOW)
    assert [each["models"] for each in seen.as_json()["instances"]] == [["a", "b"], [], ["b"]]
    assert [(each.model, each.node, each.ready) for each in seen.models] == [
        ("a", "local@mini-7", False),
        ("b", "local@mini-7", True),
        ("b", "local@mini-8", True),
    ]


WORK = Waiting(2, 5.0)
COUNTED = {
    "by the registry": ([instance(), instance("b"), instance("c", lanes=())], WORK, (2, False)),
    "by the registry, none": ([instance(lanes=())], WORK, (0, True)),
    "by the registry, none, and nothing waits": ([instance(lanes=())], Waiting(0), (0, False)),
    "by nobody": ([], WORK, (None, False)),
    "by the broker": ([], Waiting(2, consumers=3), (3, False)),
    "by the broker, none": ([], Waiting(2, consumers=0), (0, True)),
    "by both, and one has no registry node": ([instance(lanes=())], Waiting(2, consumers=1), (1, False)),
    "by the registry only, while the broker was not asked": ([instance()], None, (1, False)),
}


@pytest.mark.parametrize(("instances", "held", "nodes"), COUNTED.values(), ids=COUNTED)
def test_the_nodes_of_a_lane_are_counted(instances, held, nodes):
    (seen,) = snapshot_of(instances, [], {CHAT: held}, now=NOW).lanes
    assert (seen.nodes, seen.unserved) == nodes


def test_lanes_that_nobody_serves_come_first_then_the_deepest():
    held = {"idle": Waiting(0), CHAT: Waiting(9), "alone": Waiting(1), "unknown": None, EMBED: Waiting(10)}
    seen = snapshot_of([instance(lanes=(CHAT, EMBED))], [], held, now=NOW)
    assert [each.lane for each in seen.lanes] == ["alone", EMBED, CHAT, "idle", "unknown"]
    assert seen.lanes[-1].depth is None
