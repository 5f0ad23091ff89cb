"""The live view of a router: what is offered, for how long, and which requests it accepts."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from fleet_worker.broker.door import Refused
from fleet_worker.errors import ModelUnavailable
from fleet_worker.protocol.registry_event import READINESS, Announcement, RegistryEvent
from fleet_worker.registry.memory_bound import MemoryBound, memory_of
from fleet_worker.registry.view import ALL_ANSWERS_WITHIN, FIRST_ANSWER_WITHIN, QUIET, Registry
from tests.mlx_clients import took_less_than

WITHIN = 5.0
SECRET = "hunter2"


class Clock:
    """A clock that only moves when a test turns it."""

    now = 1000.0

    def __call__(self):
        return self.now

    def turn(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def fresh(clock):
    """The view of a router that has just asked all hosts."""
    return Registry(clock=clock)


@pytest.fixture
def registry(fresh, clock):
    """The view of a router that asked long ago."""
    clock.turn(60)
    return fresh


def about_instance(name="local", *, status="available", lane=(), capacity=None, error=None, **runtime):
    health = {"ready": status == "available", "status": status, "checked": True}
    return RegistryEvent.of(
        "offering_heartbeat",
        offering={"provider": "mlx", "instance": name, "model": READINESS},
        runtime=runtime,
        capacity=capacity or {},
        health=health | ({"error": error} if error else {}),
        lane=list(lane),
    )


def about_model(model="m", *, instance="local", status="available", capabilities=("chat",), features=(), limits=None):
    offering = {"instance": instance, "model": model, "capabilities": list(capabilities), "features": list(features)}
    return RegistryEvent.of(
        "offering_heartbeat",
        offering=offering | {"limits": limits or {}},
        runtime={},
        capacity={},
        health={"status": status},
    )


def say(registry, *events, host="mini", interval=15.0):
    registry.apply(Announcement(v=1, host=host, interval=interval, events=list(events)))


def offered(registry, *args, **filters):
    return sorted((each.model, each.instance.name) for each in registry.offerings(*args, **filters))


# --- What is offered


def test_nothing_is_known_before_the_first_event(registry):
    assert registry.offerings() == registry.models() == registry.instances() == []


def test_an_offering_needs_an_event_about_the_model_and_one_about_its_instance(registry):
    say(registry, about_model("m"))
    assert registry.offerings() == registry.models() == []
    say(registry, about_instance("another"))
    assert registry.offerings() == []
    say(registry, about_instance("local"))
    assert offered(registry) == [("m", "local")]
    assert registry.models() == ["m"]


def test_an_offering_has_what_its_host_published(registry, clock):
    capacity = {"slots": 4, "running": 2, "tokens_per_second": 31.5, "last_token_age": 0.25}
    runtime = {"node": "local@mini", "server": "mlx_lm", "version": "0.1.0"}
    limits = {"context_window": 4096}
    say(
        registry,
        about_instance(status="degraded", lane=["a", "b"], capacity=capacity, error="late", **runtime),
        about_model("m", capabilities=["chat", "stream_chat"], features=["tools"], limits=limits),
    )
    (one,) = registry.offerings()
    assert (one.model, one.capabilities, one.features, one.limits, one.ready) == (
        "m",
        ("chat", "stream_chat"),
        ("tools",),
        limits,
        False,
    )
    assert (one.node, one.host) == ("local@mini", "mini")
    (state,) = registry.instances()
    assert one.instance == state
    assert (state.host, state.name, state.node) == ("mini", "local", "local@mini")
    assert (state.status, state.ready, state.reason) == ("degraded", False, "late")
    assert (state.server, state.version) == ("mlx_lm", "0.1.0")
    assert (state.slots, state.running, state.tokens_per_second, state.last_token_age) == (4, 2, 31.5, 0.25)
    assert state.lanes == ("a", "b")
    assert state.heard_at == clock()


def test_fields_that_a_host_does_not_publish_have_defaults(registry):
    bare = {"runtime": {}, "capacity": {}, "health": {}}
    say(
        registry,
        RegistryEvent.of("offering_available", offering={"instance": "local", "model": READINESS}, **bare),
        RegistryEvent.of("offering_available", offering={"instance": "local", "model": "m"}, **bare),
    )
    (one,) = registry.offerings()
    assert (one.ready, one.capabilities, one.features, one.limits) == (False, (), (), {})
    assert (one.instance.slots, one.instance.last_token_age, one.instance.status) == (0, None, "unavailable")


def test_offerings_are_filtered_by_all_arguments(registry):
    say(
        registry,
        about_instance("one"),
        about_model("big", instance="one", capabilities=["chat", "stream_chat"], features=["tools", "vision"]),
        about_model("small", instance="one", features=["tools"]),
        about_instance("two"),
        about_model("big", instance="two", status="unavailable", capabilities=["chat"]),
        about_model("vectors", instance="two", capabilities=["embed"]),
    )
    assert offered(registry, "big") == [("big", "one"), ("big", "two")]
    assert offered(registry, capability="embed") == [("vectors", "two")]
    assert offered(registry, feature="tools") == [("big", "one"), ("small", "one")]
    assert offered(registry, ready=False) == [("big", "two")]
    assert offered(registry, "big", ready=True) == [("big", "one")]
    assert offered(registry, "big", capability="stream_chat", feature="vision", ready=True) == [("big", "one")]
    assert offered(registry, "small", capability="stream_chat") == offered(registry, "none") == []
    assert registry.models() == ["big", "small", "vectors"]
    assert registry.models(ready=False) == ["big"]


@pytest.mark.parametrize("instance", ["available", "degraded", "unavailable", "starting", "of tomorrow"])
@pytest.mark.parametrize("model", ["available", "degraded", "unavailable"])
def test_only_an_available_model_of_an_available_instance_is_ready(registry, instance, model):
    say(registry, about_instance(status=instance), about_model(status=model))
    (one,) = registry.offerings()
    assert one.ready == (instance == model == "available")


def test_two_hosts_may_have_instances_of_the_same_name(registry):
    say(registry, about_instance(node="local@a"), about_model(), host="a")
    say(registry, about_instance(node="local@b"), about_model(), host="b")
    assert [(each.host, each.node) for each in registry.offerings("m")] == [("a", "local@a"), ("b", "local@b")]
    say(registry, about_instance(status="unavailable"), host="a")
    assert [each.host for each in registry.offerings("m", ready=True)] == ["b"]
    assert [(state.host, state.ready) for state in registry.instances()] == [("a", False), ("b", True)]


def test_the_instance_of_a_node_is_known_until_its_host_is_forgotten(registry, clock):
    say(registry, about_instance(node="local@mini", pid=7, server_restarts=3))
    say(registry, about_instance(node="local@other", pid=8), host="other")
    known = registry.instance("local@mini")
    assert (known.node, known.pid, known.server_restarts, known.heard_at) == ("local@mini", 7, 3, clock.now)
    assert (registry.instance("embed@mini"), registry.instance("mini")) == (None, None)
    clock.turn(45)
    assert registry.instance("local@mini") is None


def test_returned_offerings_do_not_change_with_later_events(registry):
    say(registry, about_instance(), about_model())
    (before,) = registry.offerings()
    say(registry, about_instance(status="unavailable"))
    assert before.ready
    assert before.instance.ready


# --- Expiry


def test_an_instance_expires_after_three_of_its_intervals(registry, clock):
    say(registry, about_instance(), interval=15)
    say(registry, about_model(), interval=60)
    clock.turn(44.5)
    assert offered(registry) == [("m", "local")]
    clock.turn(0.6)
    assert registry.offerings() == registry.instances() == registry.models() == []


def test_a_model_expires_after_three_of_its_own_intervals(registry, clock):
    say(registry, about_model(), interval=60)
    for _ in range(6):
        say(registry, about_instance(), interval=15)
        clock.turn(29.9)
        assert offered(registry) == [("m", "local")]
    say(registry, about_instance(), interval=15)
    clock.turn(0.7)
    assert registry.offerings() == []
    assert [state.name for state in registry.instances()] == ["local"]


def test_every_event_renews_it(registry, clock):
    for _ in range(10):
        say(registry, about_instance(), about_model(), interval=0.05)
        clock.turn(0.1)
        assert offered(registry) == [("m", "local")]
    clock.turn(0.06)
    assert registry.offerings() == []


def test_what_has_expired_takes_no_memory(registry, clock):
    for number in range(50):
        say(registry, about_instance(), about_model(f"m{number}"), host=f"host-{number}")
    clock.turn(46)
    say(registry, about_instance(), host="last")
    assert list(registry._instances) == [("last", "local")]
    assert registry._models == {}


# --- Subscribers


@pytest.fixture
def news(registry):
    heard = []
    registry.subscribe(heard.append)
    return heard


def told(news):
    """What subscribers were told since the last call."""
    told = [(event.model, event.health["status"]) for event in news]
    news.clear()
    return told


def test_a_subscriber_is_told_about_changes_and_nothing_else(registry, news):
    say(registry, about_instance(), about_model())
    assert told(news) == [(READINESS, "available"), ("m", "available")]
    say(registry, about_instance(capacity={"running": 3}), about_model())
    assert told(news) == []
    say(registry, about_instance(status="degraded"), about_model())
    assert told(news) == [(READINESS, "degraded")]
    say(registry, about_instance(status="degraded", lane=["a"]), about_model(status="unavailable"))
    assert told(news) == [(READINESS, "degraded"), ("m", "unavailable")]
    say(registry, about_instance(), about_model(), host="another")
    assert told(news) == [(READINESS, "available"), ("m", "available")]


@pytest.mark.parametrize("other", [{"capabilities": ["embed"]}, {"features": ["tools"]}, {"limits": {"dimensions": 8}}])
def test_other_abilities_of_a_model_are_a_change(registry, news, other):
    say(registry, about_model())
    told(news)
    say(registry, about_model(**other))
    assert told(news) == [("m", "available")]


def test_an_instance_that_returns_after_it_expired_is_a_change(registry, news, clock):
    say(registry, about_instance(), about_model())
    told(news)
    clock.turn(46)
    say(registry, about_instance(), about_model())
    assert told(news) == [(READINESS, "available"), ("m", "available")]


def test_a_subscriber_that_fails_does_not_affect_the_others(registry, caplog):
    def fail(event):
        raise ValueError(SECRET)

    heard = []
    registry.subscribe(fail)
    registry.subscribe(heard.append)
    say(registry, about_instance(), about_model())
    assert [event.model for event in heard] == [READINESS, "m"]
    assert offered(registry) == [("m", "local")]
    assert "ValueError" in caplog.text
    assert SECRET not in caplog.text


def test_a_subscriber_may_ask_and_may_end_its_own_subscription(registry):
    seen = []

    def once(event):
        seen.append(offered(registry))
        end()

    end = registry.subscribe(once)
    others = []
    registry.subscribe(others.append)
    say(registry, about_instance())
    say(registry, about_model())
    assert seen == [[]]
    assert len(others) == 2


def test_a_subscriber_is_told_nothing_after_it_unsubscribed(registry, news):
    others = []
    end = registry.subscribe(others.append)
    say(registry, about_instance())
    end()
    end()
    say(registry, about_model())
    assert [event.model for event in others] == [READINESS]
    assert len(news) == 2


# --- Waiting for a model


def test_a_model_that_is_ready_is_not_waited_for(registry):
    say(registry, about_instance(), about_model())
    with took_less_than(1):
        assert [each.model for each in registry.wait_for("m", 60)] == ["m"]


def test_a_model_is_waited_for_until_it_is_ready(registry):
    say(registry, about_instance(status="starting"), about_model(), about_model("other"))
    with ThreadPoolExecutor(1) as pool, took_less_than(WITHIN):
        waiting = pool.submit(registry.wait_for, "m", 60)
        say(registry, about_instance("another"), about_model("other", instance="another"))
        assert not waiting.done()
        say(registry, about_instance(status="available"))
        assert [(each.model, each.ready) for each in waiting.result(WITHIN)] == [("m", True)]


def test_a_model_that_does_not_become_ready_is_waited_for_no_longer_than_asked(registry):
    say(registry, about_instance(status="unavailable"), about_model("qwen3-14b"), about_model("phi", capabilities=[]))
    with took_less_than(WITHIN), pytest.raises(ModelUnavailable, match=r"after 0\.05 s") as caught:
        registry.wait_for("qwen3-14b", 0.05)
    assert caught.value.message == "after 0.05 s none of its instances is ready"
    assert caught.value.metadata == {"nearest": [], "param": "model"}
    with pytest.raises(ModelUnavailable, match="no instance offers it; the nearest that exist: qwen3-14b") as caught:
        registry.wait_for("qwen3-14", 0.01)
    assert caught.value.metadata["nearest"] == ["qwen3-14b"]


def test_a_model_is_waited_for_with_a_capability(registry):
    say(registry, about_instance(), about_model(capabilities=["chat"]))
    with pytest.raises(ModelUnavailable):
        registry.wait_for("m", 0.02, capability="embed")
    assert registry.wait_for("m", 0.02, capability="chat")


def test_offerings_that_were_waited_for_are_returned_even_if_they_are_gone_again(registry, monkeypatch):
    answers = iter([[], ["ready"], []])
    monkeypatch.setattr(registry, "offerings", lambda *args, **filters: next(answers))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(registry.wait_for, "m", WITHIN)
        while not waiting.done():
            say(registry, about_instance())
        assert waiting.result() == ["ready"]


# --- Which requests are accepted


@pytest.fixture
def known(registry):
    say(
        registry,
        about_instance("one", node="one@mini"),
        about_model("qwen3-14b", instance="one", capabilities=["chat"]),
        about_model("qwen3-8b", instance="one", capabilities=["chat"]),
        about_model("minilm", instance="one", capabilities=["embed"]),
        about_instance("two", status="unavailable", node="two@mini"),
        about_model("qwen3-8b", instance="two", status="unavailable", capabilities=["chat"]),
    )
    return registry


@pytest.mark.parametrize(
    "wanted",
    [
        ("qwen3-14b", "chat"),
        ("qwen3-14b", "chat", "any"),
        ("qwen3-14b", "chat", "one"),
        ("qwen3-8b", "chat", "two"),  # not ready now, perhaps before the deadline
        ("minilm", "embed"),
        ("qwen3-8b", "chat", "any", "two@mini"),
    ],
)
def test_a_request_that_is_offered_is_accepted_at_once(known, wanted):
    with took_less_than(0.2):
        known.require_offered(*wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        ("qwen3-32b", "chat"),
        ("minilm", "chat"),
        ("qwen3-14b", "chat", "two"),
        ("qwen3-8b", "chat", "three"),
        ("qwen3-14b", "chat", "any", "two@mini"),
        ("qwen3-14b", "chat", "any", "three@mini"),
    ],
)
def test_a_request_that_is_not_offered_is_refused_at_once(known, wanted):
    with took_less_than(0.2), pytest.raises(ModelUnavailable):
        known.require_offered(*wanted)


def test_a_refusal_names_the_nearest_models_and_not_what_was_asked_for(known):
    with pytest.raises(ModelUnavailable) as caught:
        known.require_offered("qwen3-14", "chat")
    assert caught.value.metadata["nearest"] == ["qwen3-14b", "qwen3-8b"]
    assert caught.value.message == (
        "no instance offers chat with that model; the nearest that exist: qwen3-14b, qwen3-8b; fleet-worker status "
        "lists all models"
    )
    with pytest.raises(ModelUnavailable) as caught:
        known.require_offered(SECRET, "chat")
    assert caught.value.message == "no instance offers chat with that model; fleet-worker status lists all models"
    assert caught.value.metadata["nearest"] == []


def test_a_refusal_names_the_nearest_nodes_if_one_is_asked_for(known):
    with pytest.raises(ModelUnavailable) as caught:
        known.require_offered("qwen3-14b", "chat", "any", "one@mimi")
    assert caught.value.message == "no node of that name is known; nodes that offer it: one@mini"
    assert caught.value.metadata["nearest"] == ["one@mini"]  # two@mini does not serve this model


@pytest.mark.parametrize(
    ("wanted", "said", "param", "nearest"),
    [
        (
            ("minilm", "chat"),
            "minilm is in the fleet, but only for: embed; for chat there are: qwen3-14b, qwen3-8b",
            "model",
            ["qwen3-14b", "qwen3-8b"],
        ),
        (
            ("qwen3-8b", "embed"),
            "qwen3-8b is in the fleet, but only for: chat; for embed there are: minilm",
            "model",
            ["minilm"],
        ),
        (
            ("qwen3-8b", "stream_chat"),
            "qwen3-8b is in the fleet, but only for: chat, and no model is for stream_chat",
            "model",
            [],
        ),
        (
            ("qwen3-14b", "chat", "onee"),
            "no instance has that name; instances that offer it: one",
            "instance",
            ["one"],
        ),
        (
            ("qwen3-8b", "chat", "xyz"),
            "no instance has that name; instances that offer it: one, two",
            "instance",
            [],
        ),
        (
            ("qwen3-14b", "chat", "two"),
            "no instance of that name offers chat with qwen3-14b; instances that offer it: one",
            "instance",
            [],
        ),
        (
            ("qwen3-14b", "chat", "any", "two@mini"),
            "that node does not offer chat with qwen3-14b; nodes that offer it: one@mini",
            "node",
            ["one@mini"],
        ),
        (
            ("minilx", "chat"),
            "no instance offers chat with that model; fleet-worker status lists all models",  # minilm cannot chat
            "model",
            [],
        ),
    ],
)
def test_a_refusal_tells_which_part_of_the_request_does_not_fit_and_what_does(known, wanted, said, param, nearest):
    with pytest.raises(ModelUnavailable) as caught:
        known.require_offered(*wanted)
    assert (caught.value.message, caught.value.param) == (said, param)
    assert sorted(caught.value.metadata["nearest"]) == nearest
    assert not set(wanted) & set(caught.value.metadata["nearest"])


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ("qwen3", ["org/Qwen3-14B-4bit", "org/Qwen3-8B"]),
        ("QWEN3-8B", ["org/Qwen3-8B", "org/Qwen3-14B-4bit"]),
        ("org/qwen3-8b", ["org/Qwen3-8B", "org/Qwen3-14B-4bit"]),  # the right name in another case
        ("gemma-3-12b", ["gemma-3-27b"]),
        ("nothing-like-it", []),
    ],
)
def test_the_nearest_names_are_those_that_a_person_would_name(registry, wanted, nearest):
    say(registry, about_instance(), *map(about_model, ["org/Qwen3-8B", "org/Qwen3-14B-4bit", "gemma-3-27b", "phi"]))
    with pytest.raises(ModelUnavailable) as caught:
        registry.require_offered(wanted, "chat")
    assert caught.value.metadata["nearest"] == nearest


def test_a_refusal_lists_a_few_of_many_names(registry):
    for number in range(20):
        say(registry, about_instance(f"i{number:02}"), about_model("m", instance=f"i{number:02}"))
    with pytest.raises(ModelUnavailable) as caught:
        registry.require_offered("m", "chat", "nope")
    assert "i00, i01, i02, i03, i04, i05, i06, i07 and 12 more" in caught.value.message


@pytest.fixture
def script(fresh, clock, monkeypatch):
    """Deliver events so many seconds after a fresh router asked, while it waits; no real time passes."""
    words = []

    def wait(patience):
        if words and words[0][0] <= clock() + patience:
            clock.now, host, events = words.pop(0)
            say(fresh, *events, host=host)
        else:
            clock.turn(patience)

    def write(seconds, host, *events):
        words.append((fresh._asked_at + seconds, host, events))

    monkeypatch.setattr(fresh._changed, "wait", wait)
    return write


@pytest.fixture
def waited(fresh, clock):
    """Seconds since the fresh router asked."""
    return lambda: clock() - fresh._asked_at


OFFERED = (about_instance(), about_model("m"))
OTHER = (about_instance(), about_model("other"))


def test_in_a_fleet_without_registry_nodes_every_request_is_accepted(fresh, script, waited):
    fresh.require_offered("m", "chat")
    fresh.require_offered("another", "embed")
    assert waited() == pytest.approx(FIRST_ANSWER_WITHIN)


def test_when_all_registry_nodes_have_expired_every_request_is_accepted(known, clock):
    clock.turn(46)
    with took_less_than(0.2):
        known.require_offered("qwen3-32b", "chat")


def test_a_fresh_router_waits_for_the_first_answer(fresh, script, waited):
    script(FIRST_ANSWER_WITHIN - 0.01, "mini", *OFFERED)
    fresh.require_offered("m", "chat")
    assert waited() == pytest.approx(FIRST_ANSWER_WITHIN - 0.01)


def test_a_fresh_router_waits_for_the_answers_of_all_hosts(fresh, script, waited):
    script(0.1, "quick", *OTHER)
    script(ALL_ANSWERS_WITHIN - 0.01, "slow", *OFFERED)
    fresh.require_offered("m", "chat")
    assert waited() == pytest.approx(ALL_ANSWERS_WITHIN - 0.01)


def test_a_fresh_router_does_not_wait_longer_than_for_all_answers(fresh, script, waited):
    for number in range(1, 30):
        script(number / 10, f"host-{number}", *OTHER)
    with pytest.raises(ModelUnavailable):
        fresh.require_offered("m", "chat")
    assert waited() == pytest.approx(ALL_ANSWERS_WITHIN)


def test_a_router_that_asked_again_is_fresh_again(fresh, script, waited, clock):
    say(fresh, *OTHER)
    clock.turn(10)
    fresh.note_asked()
    script(0.5, "mini", *OFFERED)
    fresh.require_offered("m", "chat")
    assert waited() == pytest.approx(0.5)


def test_a_request_that_waits_for_the_first_answer_is_woken_by_it(fresh):
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(fresh.require_offered, "m", "chat")
        say(fresh, *OFFERED)
        checking.result(WITHIN)


def test_all_hosts_can_be_asked_again(clock):
    asked = []
    Registry(ask=lambda: asked.append(1), clock=clock).refresh()
    assert asked == [1]


# --- Settling


def test_without_an_answer_it_settles_soon(fresh, script, waited):
    assert fresh.wait_for_answers() is fresh
    assert waited() == pytest.approx(FIRST_ANSWER_WITHIN)


def test_it_settles_after_a_pause_without_answers(fresh, script, waited):
    for number in range(3):
        script(0.1 * number, f"host-{number}", *OTHER)
    script(0.2 + QUIET + 0.1, "late", *OFFERED)
    fresh.wait_for_answers()
    assert waited() == pytest.approx(0.2 + QUIET)
    assert fresh.models() == ["other"]


def test_it_settles_in_time_even_if_answers_do_not_end(fresh, script, waited):
    for number in range(30):
        script(number / 10, f"host-{number}", *OTHER)
    fresh.wait_for_answers()
    assert waited() == pytest.approx(ALL_ANSWERS_WITHIN)


def test_a_view_that_has_settled_does_not_wait(fresh, script, waited, clock):
    say(fresh, *OFFERED)
    clock.turn(100)
    for _ in range(10):
        fresh.wait_for_answers()
    assert waited() == 100


# --- Messages, and threads


def message(body):
    return SimpleNamespace(body=body)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"capacity": {"slots": each}} for each in (SECRET, -1, 10**30, [1], None)),
        *({"capacity": {"running": each}} for each in (None, -5, 1e300, {})),
        *({"capacity": {"tokens_per_second": each}} for each in ([SECRET], -1.0, 1e300, "nan", "inf")),
        *({"capacity": {"last_token_age": each}} for each in (["x"], {}, SECRET, -1, 1e300)),
        *({"capacity": {"cached_tokens": each}} for each in (["x"], SECRET, -1, 1e300)),
        *({"capacity": {"cache_troubles": each}} for each in (5, [SECRET], [{}], [{"kind": "small"}] * 11)),
        *({"capacity": {"cache_troubles": [{"kind": "small", "model": each}]}} for each in (5, "x" * 256)),
        *({"runtime": {"pid": each}} for each in (SECRET, -1, 2**40)),
        *({"runtime": {name: each}} for name in ("node", "server", "version") for each in (["x"], 5, "x" * 256)),
        *({"lane": each} for each in (["x" * 256],)),
        *({"health": {"status": each}} for each in ("x" * 256,)),
        *({"offering": {"instance": each, "model": READINESS}} for each in ("x" * 256,)),
        {"offering": {"instance": "local", "model": "x" * 256}},
        {"offering": {"instance": "local", "model": ["m"]}},
        *(
            {"offering": {"instance": "local", "model": "m", "limits": each}}
            for each in (SECRET, {"x": [1]}, {"x": {}})
        ),
        *({"offering": {"instance": "local", "model": "m", "capabilities": each}} for each in (None, [[True]], [5])),
        *({"offering": {"instance": "local", "model": "m", "features": each}} for each in (5, [[True]], ["x" * 256])),
    ],
)
def test_an_invalid_message_is_refused_and_the_next_one_applied(registry, wrong):
    good = Announcement(v=1, host="mini", interval=15.0, events=[about_instance()])
    bad = good.model_copy(update={"host": "strange", "events": [about_instance().model_copy(update=wrong)]})
    with pytest.raises(Refused) as caught:
        registry.receive(message(bad.encode()))
    assert SECRET not in str(caught.value) + caught.value.detail
    registry.receive(message(good.encode()))
    assert [state.host for state in registry.instances()] == ["mini"]
    assert not registry.models()


@pytest.mark.parametrize(
    "body",
    [
        *(SECRET.encode(), b"", b"[]", b"null", b"5", b"\xff", b"{}", b"[" * 100_000),
        *(b'{"v": 1, "host": "h", "events": [], "interval": %s}' % each for each in (b"1e400", b"NaN", b"0", b'"x"')),
        *(b'{"v": 1, "host": %s, "events": [], "interval": 1}' % each for each in (b"[]", b'"%s"' % (b"x" * 256))),
        *(b'{"v": 1, "host": "h", "events": %s, "interval": 1}' % each for each in (b"[5]", b"{}", b"[[]]", b'"x"')),
    ],
)
def test_what_is_no_announcement_is_refused(registry, body):
    with pytest.raises(Refused):
        registry.receive(message(body))


def test_a_host_that_announces_an_endless_interval_is_forgotten_after_three_days(registry, clock):
    registry.receive(message(b'{"v": 1, "host": "h", "interval": 1e300, "events": []}'))
    say(registry, about_instance(), interval=1e300)
    clock.turn(3 * 24 * 3600 - 1)
    assert registry.instances()
    clock.turn(2)
    assert not registry.instances()


def test_a_long_reason_is_kept_in_part(registry):
    say(registry, about_instance(status="degraded", error="x" * 100_000))
    assert len(registry.instances()[0].reason) == 1000


def hear_of(registry, host, **about):
    body = Announcement(v=1, host=host, interval=15.0, events=[about_instance(**about), about_model()]).encode()
    registry.receive(message(body))
    return body


def test_invented_nodes_are_not_remembered_without_a_bound(clock, caplog):
    registry = Registry(clock=clock, most_bytes=100_000)
    hear_of(registry, "mini")
    for number in range(1_000):
        hear_of(registry, f"h{number}")
    assert 10 < len(registry.instances()) < 100
    assert caplog.text.count("the registry is full") == 1
    hear_of(registry, "mini", status="degraded")
    assert next(each.instance.status for each in registry.offerings("m") if each.host == "mini") == "degraded"
    clock.turn(46)
    for number in range(1_000):
        hear_of(registry, f"another{number}")
    assert 10 < len(registry.instances()) < 100
    assert all(each.host.startswith("another") for each in registry.instances())


@pytest.mark.parametrize("lanes", [[], ["x" * 200] * 20, [str(number) for number in range(500)]])
def test_the_memory_of_what_is_known_is_estimated_well_enough(clock, lanes):
    registry = Registry(clock=clock)
    tracemalloc.start()
    try:
        estimated = sum(memory_of(hear_of(registry, f"h{number}", lane=lanes)) for number in range(30))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 1.3 * estimated


def test_what_is_gone_makes_room():
    memory = MemoryBound(100)
    assert memory.remember("a", 60)
    assert not memory.remember("b", 50)
    assert memory.remember("a", 40)
    assert memory.remember("b", 60)
    memory.forget("a")
    memory.forget("never known")
    assert memory.remember("c", 40)
    memory.keep_only(["c"])
    assert memory.remember("d", 60)
    assert not memory.remember("e", 1)


def test_many_threads_may_apply_and_ask_at_once(registry, news):
    hosts = range(8)

    def speak(host):
        for status in ("starting", "available") * 25:
            say(registry, about_instance(status=status), about_model(f"m{host}"), host=f"host-{host}")

    def ask(_):
        for _ in range(50):
            assert len(registry.offerings()) <= len(hosts)
            assert len(registry.instances()) <= len(hosts)

    with ThreadPoolExecutor(12) as pool:
        work = [pool.submit(speak, host) for host in hosts] + [pool.submit(ask, number) for number in range(4)]
        for each in work:
            each.result(WITHIN)
    assert registry.models(ready=True) == [f"m{host}" for host in hosts]
    assert sum(event.model == READINESS for event in news) == len(hosts) * 50
    assert sum(event.model != READINESS for event in news) == len(hosts)


# --- Since when nobody is there


def test_it_tells_since_when_nobody_serves_what_is_known(registry, clock):
    assert registry.away_for("m", "chat") is None
    say(registry, about_instance(), about_model())
    assert registry.away_for("m", "chat") == 0.0
    assert registry.away_for("m", "embed") is None
    assert registry.away_for("m", "chat", instance="other") is None
    down = {"status": "unavailable", "capacity": {"status_age": 30.0}}
    say(registry, about_instance(**down), about_model(status="unavailable"))
    clock.turn(10)
    assert registry.away_for("m", "chat") == 40.0
    say(registry, about_instance("second"), about_model(instance="second"))
    assert registry.away_for("m", "chat") == 0.0
    assert registry.away_for("m", "chat", instance="local") == 40.0


def test_a_host_that_fell_silent_is_away_since_it_was_heard(registry, clock):
    say(registry, about_instance(), about_model())
    clock.turn(20)
    assert registry.away_for("m", "chat") == 0.0
    clock.turn(3)
    assert registry.away_for("m", "chat") == 23.0
    clock.turn(60)  # it is forgotten
    assert registry.offerings("m") == []
    assert registry.away_for("m", "chat") == 83.0


# --- Clocks


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 90.0])
def test_it_knows_how_wrong_the_clock_of_a_host_is(registry, ahead):
    at = datetime.now(UTC) + timedelta(seconds=ahead)
    say(registry, about_instance().model_copy(update={"occurred_at": at.isoformat()}))
    assert registry.instances()[0].clock_ahead == pytest.approx(ahead, abs=1)


@pytest.mark.parametrize("occurred_at", ["", "yesterday", "2026-01-01T00:00:00", "9999-12-31T23:59:59+99:99"])
def test_a_time_that_is_none_says_nothing_about_a_clock(registry, occurred_at):
    say(registry, about_instance().model_copy(update={"occurred_at": occurred_at}))
    assert registry.instances()[0].clock_ahead is None
