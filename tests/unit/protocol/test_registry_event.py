"""Registry events: what they contain, what they must not contain, and what is accepted as one."""

import json
import re
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleet_worker.errors import InvalidRequest, PolicyError
from fleet_worker.protocol.registry_event import MODEL_MISSING, READINESS, Announcement, RegistryEvent
from fleet_worker.protocol.status import STATUSES, CacheTrouble, InstanceStatus, ModelStatus

SENSITIVE = [
    *("access_key", "api_key", "authorization", "bearer", "client_secret", "credential", "credentials", "endpoint"),
    *("endpoint_url", "password", "path", "private_key", "prompt", "reply_to", "secret", "secrets", "token", "url"),
]
ENDS = ("_key", "_secret", "_token", "_password")
HARMLESS = ("model", "tokens", "max_tokens", "last_token_age", "keys", "monkey", "paths", "tokenizer", "urls", "key")
SECRET = "hunter2"


def event(**fields):
    parts = {"runtime": {}, "capacity": {}, "health": {}, "offering": {"instance": "local", "model": "m"}, **fields}
    return RegistryEvent.of("offering_available", **parts)


def message(**fields):
    """A message as a dictionary, as another version might have sent it."""
    said = json.loads(Announcement(v=1, host="mini", interval=15.0, events=[event()]).encode())
    return json.dumps({**said, **fields})


# --- What must not be in one


def spelled(key):
    return [key, key.upper(), key.title(), key.replace("_", "-"), key.replace("_", " "), key.replace("_", ".")]


@pytest.mark.parametrize("key", [*SENSITIVE, *(f"wandb{end}" for end in ENDS)])
def test_a_sensitive_key_is_dropped_from_an_offering_however_it_is_spelled(key):
    for name in spelled(key):
        assert event(offering={"model": "m", name: SECRET}).offering == {"model": "m"}


@pytest.mark.parametrize("key", [*SENSITIVE, *(f"wandb{end}" for end in ENDS)])
def test_a_sensitive_key_is_refused_anywhere_else_by_its_path(key):
    for name in spelled(key):
        for part in ("runtime", "capacity", "health", "metadata"):
            with pytest.raises(PolicyError) as caught:
                event(**{part: {"fine": 1, name: SECRET}})
            assert caught.value.message == f"a registry event must not have {part}.{name}"


@pytest.mark.parametrize("key", HARMLESS)
def test_other_keys_stay(key):
    assert event(offering={key: 1}, metadata={key: 1}).offering == {key: 1}


def test_lists_and_objects_in_them_are_walked_too():
    nested = {"a": [{"b": [{"Api-Key": SECRET, "c": 1}]}, "text", 2, None, True]}
    without = {"a": [{"b": [{"c": 1}]}, "text", 2, None, True]}
    assert event(offering=nested).offering == without
    with pytest.raises(PolicyError, match=re.escape("metadata.a.0.b.0.Api-Key")) as caught:
        event(metadata=nested)
    assert SECRET not in str(caught.value)


def test_an_offering_is_copied_and_not_changed():
    offering = {"model": "m", "limits": [{"token": SECRET}]}
    event(offering=offering)
    assert offering == {"model": "m", "limits": [{"token": SECRET}]}


names = st.sampled_from([*SENSITIVE, "HF_Token", "x.password", *HARMLESS])
values = st.recursive(
    st.sampled_from([SECRET, 1, None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def keys_in(value):
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from keys_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_in(inner)


@given(st.dictionaries(names, values, max_size=4))
def test_nothing_sensitive_is_ever_in_one(said):
    harmless = set(keys_in(said)) <= set(HARMLESS)
    kept = event(offering=said).offering
    assert set(keys_in(kept)) <= set(HARMLESS)
    assert kept == said or not harmless
    if harmless:
        event(metadata=said)
    else:
        with pytest.raises(PolicyError) as caught:
            event(metadata=said)
        assert SECRET not in str(caught.value)


# --- What is in one


def test_each_has_an_id_of_its_own_and_the_moment_at_which_it_was_made():
    first, second = event(), event()
    assert uuid.UUID(first.event_id) != uuid.UUID(second.event_id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first.occurred_at)
    age = datetime.now(UTC) - datetime.fromisoformat(first.occurred_at)
    assert timedelta(0) <= age < timedelta(seconds=10)


def test_it_knows_its_instance_and_its_model():
    about = event(offering={"instance": "local", "model": READINESS})
    assert (about.instance, about.model) == ("local", "provider-readiness")


def test_an_unknown_type_is_refused_without_saying_what_it_was():
    with pytest.raises(ValidationError) as caught:
        RegistryEvent.of(SECRET, offering={}, runtime={}, capacity={}, health={})
    assert SECRET not in str(caught.value)


# --- On the wire


def test_what_was_encoded_is_decoded():
    said = Announcement(v=1, host="mini", interval=0.05, events=[event(lane=["a", "b"]), event(health={"ready": True})])
    assert Announcement.decode(said.encode()) == said


def test_what_a_newer_version_adds_is_ignored():
    said = json.loads(message(extra=1))
    said["events"][0]["extra"] = {"a": SECRET}
    heard = Announcement.decode(json.dumps(said))
    assert heard.events[0].model == "m"
    assert not hasattr(heard, "extra")


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"v": 2}, "v"),
        ({"v": "1"}, "v"),
        ({"host": 5}, "host"),
        ({"host": None}, "host"),
        ({"interval": SECRET}, "interval"),
        ({"interval": "15"}, "interval"),
        ({"interval": 0}, "interval"),
        ({"interval": -15}, "interval"),
        ({"interval": float("nan")}, "interval"),
        ({"interval": float("inf")}, "interval"),
        ({"events": {SECRET: 1}}, "events"),
        ({"events": [SECRET]}, "events.0"),
        ({"events": [{}]}, "events.0.event_id: is missing"),
    ],
)
def test_what_is_known_has_to_be_right_and_the_text_says_where_it_is_not(wrong, where):
    with pytest.raises(InvalidRequest) as caught:
        Announcement.decode(message(**wrong))
    assert where in caught.value.message
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"event_type": SECRET},
        {"offering": [SECRET]},
        {"runtime": SECRET},
        {"capacity": None},
        {"health": SECRET},
        {"lane": SECRET},
        {"lane": [{"token": SECRET}]},
        {"metadata": SECRET},
    ],
)
def test_one_wrong_event_is_a_wrong_message(wrong):
    said = json.loads(message())
    said["events"][0] |= wrong
    with pytest.raises(InvalidRequest) as caught:
        Announcement.decode(json.dumps(said))
    assert f"events.0.{next(iter(wrong))}" in caught.value.message
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"hunter2", b"[]", b"null", b"\xffhunter2", b'{"v": 1', "hunter2", b'{"v": 1}'])
def test_anything_else_is_refused(body):
    with pytest.raises(InvalidRequest) as caught:
        Announcement.decode(body)
    assert SECRET not in str(caught.value)


# --- A status on the wire

statuses = st.sampled_from(STATUSES)
texts = st.text(max_size=8)
troubles = st.builds(
    CacheTrouble, kind=texts, model=texts, count=st.integers(0, 99), of=st.integers(0, 99), request_id=texts
)
instances = st.builds(
    InstanceStatus,
    host=texts,
    name=texts,
    node=texts,
    status=statuses,
    reason=texts,
    server=texts,
    version=texts,
    pid=st.integers(1, 2**22),
    slots=st.integers(0, 99),
    running=st.integers(0, 99),
    tokens_per_second=st.floats(0, 1e6),
    last_token_age=st.none() | st.floats(0, 1e6),
    lanes=st.lists(texts, max_size=3).map(tuple),
    process=texts,
    server_restarts=st.none() | st.integers(0, 2**53),
    prompt_tokens=st.none() | st.integers(0, 2**53),
    cached_tokens=st.none() | st.integers(0, 2**53),
    cache_troubles=st.lists(troubles, max_size=3).map(tuple),
)
models = st.builds(
    ModelStatus,
    model=texts.filter(lambda name: name != READINESS),
    capabilities=st.lists(st.sampled_from(["chat", "stream_chat", "embed"]), max_size=3).map(tuple),
    features=st.lists(texts, max_size=3).map(tuple),
    limits=st.dictionaries(st.sampled_from(["context_window", "dimensions"]), st.integers(1, 9)),
    status=statuses,
)


def over_the_wire(event):
    (heard,) = Announcement.decode(Announcement(v=1, host="mini", interval=15.0, events=[event]).encode()).events
    return heard


@given(instances)
def test_an_instance_arrives_as_it_was_published(instance):
    heard = over_the_wire(RegistryEvent.about(instance))
    arrived = heard.instance_status(instance.host, heard_at=1.0, expires_at=46.0)
    assert arrived == instance
    assert (arrived.heard_at, arrived.expires_at) == (1.0, 46.0)
    assert (heard.model, heard.status, heard.health["ready"]) == (READINESS, instance.status, instance.ready)


@given(instances, models)
def test_a_model_arrives_as_it_was_published(instance, model):
    heard = over_the_wire(RegistryEvent.about(instance, model))
    assert heard.model_status(expires_at=46.0) == model
    assert (heard.instance, heard.runtime["node"]) == (instance.name, instance.node)
    reason = instance.reason if model.status == instance.status else MODEL_MISSING
    assert heard.health.get("error", "") == reason


def test_fields_are_those_of_lex_llm():
    """Routers of other versions read them."""
    instance = InstanceStatus(
        host="mini",
        name="local",
        node="local@mini",
        status="degraded",
        reason="late",
        server="mlx_lm",
        version="0.1.0",
        pid=7,
        slots=4,
        running=1,
        tokens_per_second=31.5,
        last_token_age=0.25,
        lanes=("lane",),
    )
    said = RegistryEvent.about(instance).model_dump(exclude={"event_id", "occurred_at"})
    assert said == {
        "event_type": "offering_degraded",
        "offering": {"provider": "mlx", "instance": "local", "model": READINESS, "usage": "inference"},
        "runtime": {"node": "local@mini", "host": "mini", "version": "0.1.0", "server": "mlx_lm", "pid": 7},
        "capacity": {"slots": 4, "running": 1, "tokens_per_second": 31.5, "last_token_age": 0.25},
        "health": {"ready": False, "status": "degraded", "checked": True, "error": "late"},
        "lane": ["lane"],
        "metadata": {"extension": "fleet_worker", "configured": True, "live": True},
    }
    assert RegistryEvent.about(instance, known="degraded").event_type == "offering_heartbeat"
