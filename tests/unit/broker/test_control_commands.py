"""Which commands of Celery's remote control a node obeys, from whom, and what it replies. One test needs a broker."""

import contextlib
import json
import random
from types import SimpleNamespace

import pytest
import redis
from celery.worker.control import Panel
from kombu.exceptions import InconsistencyError
from kombu.utils.limits import TokenBucket

from fleet_worker import Settings
from fleet_worker.broker import control_commands as module
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import connect
from fleet_worker.broker.control_commands import (
    COMMANDS_AT_ONCE,
    EVENTS_ARE_ON,
    NO_COMMAND,
    NOT_OBEYED,
    PATTERN,
    READ_ONLY,
    TOO_FAST,
    ControlCommands,
)
from fleet_worker.broker.door import Refused
from fleet_worker.testing import embedded_broker

NAME = "one@mini"
REPLY_TO = {"exchange": "reply.llm.fleet.control.pidbox", "routing_key": "me"}
COMMAND = {"method": "where", "arguments": {}, "destination": [NAME], "pattern": None, "matcher": None}
QUESTION = {**COMMAND, "ticket": "t", "reply_to": REPLY_TO}


@pytest.fixture
def called():
    return []


@pytest.fixture
def published(monkeypatch):
    """What is published, and where."""
    published = []

    class Producer:
        def __init__(self, channel, **options):
            pass

        def publish(self, body, *, exchange, routing_key, headers, **options):
            published.append((body, exchange, routing_key, headers["ticket"]))

    monkeypatch.setattr(module, "Producer", Producer)
    return published


@pytest.fixture
def commands(called, published):
    def where(state):
        called.append(state.hostname)
        return {"where": state.hostname}

    with create_app(Settings()) as app:
        yield ControlCommands(app, NAME, {"where": where})


def send(commands, command):
    body = command if isinstance(command, bytes) else json.dumps(command).encode()
    commands.receive(SimpleNamespace(body=body))


def replies(commands, published, **fields):
    send(commands, {**QUESTION, **fields})
    return [body[NAME] for body, *_ in published]


def refused(commands, command):
    """Why it is refused, as the log says."""
    with pytest.raises(Refused) as caught:
        send(commands, command)
    return caught.value.kind


def test_a_question_is_replied_to_where_kombu_waits_for_it(commands, published):
    send(commands, QUESTION)
    assert published == [({NAME: {"where": NAME}}, REPLY_TO["exchange"], "me", "t")]


@pytest.mark.parametrize(
    ("destination", "obeyed"),
    [
        (None, True),
        ([], True),
        ([NAME, "two@mini"], True),
        (["*@mini"], True),
        (["two@mini"], False),
        (["*@min"], False),
        (["*@*"], False),
        (["*"], False),
        ([NAME[:3]], False),
    ],
)
def test_a_command_is_for_the_nodes_that_it_names_and_for_hosts(commands, called, destination, obeyed):
    send(commands, {**COMMAND, "destination": destination})
    assert called == [NAME] * obeyed


@pytest.mark.parametrize("method", ["restart", "restart_server"])
def test_a_restart_is_only_for_the_nodes_that_it_names(called, published, method):
    """All nodes of a host, or of the fleet, would be away at the same time."""
    with create_app(Settings()) as app:
        commands = ControlCommands(app, NAME, {method: lambda state: called.append(method)})
        for destination in (None, [], ["*@mini"], ["two@mini"]):
            send(commands, {**COMMAND, "method": method, "destination": destination})
        assert called == []
        send(commands, {**COMMAND, "method": method, "destination": ["two@mini", NAME]})
        assert called == [method]


@pytest.mark.parametrize("pattern", ["(.*)*$", ".*", NAME])
def test_a_pattern_is_not_obeyed_since_an_expression_may_never_end(commands, called, pattern):
    command = {**COMMAND, "destination": None, "pattern": pattern, "matcher": "pcre"}
    assert refused(commands, command) == PATTERN
    assert called == []


@pytest.mark.parametrize("name", sorted(Panel.data.keys() - {*READ_ONLY, EVENTS_ARE_ON}))
def test_each_other_command_of_celery_is_refused_in_a_clear_answer(commands, published, name, monkeypatch):
    monkeypatch.setitem(Panel.data, name, lambda *_, **__: pytest.fail("it was executed"))
    assert refused(commands, {**QUESTION, "method": name}) == NOT_OBEYED
    ((reply, *_),) = published
    assert reply[NAME]["error"].startswith(f"{NOT_OBEYED}; it obeys: active, active_queues, conf, ")


def test_a_command_that_celery_does_not_have_is_refused_alike(commands, published):
    assert refused(commands, {**QUESTION, "method": "unheard_of"}) == NOT_OBEYED
    assert "does not obey" in published[0][0][NAME]["error"]


def test_a_command_that_fails_is_an_answer_without_the_text_of_the_error(commands, published, caplog):
    commands._commands["bad"] = lambda state: {}["secret"]
    assert replies(commands, published, method="bad") == [
        {"error": "the command failed (KeyError): see the node's log"}
    ]
    assert "the control command bad failed: KeyError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "reply_to", [None, {"exchange": "", "routing_key": "llm.fleet.reply.someone.1"}, {**REPLY_TO, "exchange": "llm"}]
)
def test_a_reply_goes_only_through_our_own_exchange(commands, called, published, reply_to):
    send(commands, {**QUESTION, "reply_to": reply_to})
    assert (called, published) == ([NAME], [])


def test_a_reply_that_nobody_waits_for_any_more_is_dropped(commands, called, monkeypatch):
    def gone(*_, **__):
        raise InconsistencyError

    monkeypatch.setattr(module.Producer, "publish", gone)
    send(commands, QUESTION)
    assert called == [NAME]


def test_a_reply_to_an_asker_that_was_killed_expires():
    with (
        embedded_broker() as url,
        redis.Redis.from_url(url) as client,
        create_app(Settings(broker_url=url)) as app,
        app.connection_for_write() as connection,
    ):
        queue = app.control.mailbox.get_reply_queue()
        with app.connection_for_read() as asker:
            queue(connect(asker, 5.0).default_channel).declare()
        commands = ControlCommands(app, NAME, {"where": lambda state: 1})
        commands.channel = connect(connection, 5.0).default_channel
        send(commands, {**QUESTION, "reply_to": {**REPLY_TO, "routing_key": queue.routing_key}})
        assert client.llen(queue.name) == 1
        assert 0 < client.ttl(queue.name) <= module.REPLIES_EXPIRE


WRONG = ["", "x", "\ud800", [], [[]], {}, {"a": []}, 0, 1, -1, 1.5, True, 10**400, "y" * 300, ["\ud800"], [1], [None]]


def nonsense(seed):
    """Messages that differ from a question in some fields, or are none at all."""
    draw = random.Random(seed)
    yield from (b"", b"[]", b"null", b"\xff", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"x" * 300_000, b"\0")
    yield json.dumps({**QUESTION, "destination": [1] * 100_000}).encode()
    yield json.dumps({**QUESTION, "destination": ["x"] * 10_000}).encode()
    for _ in range(300):
        fields = draw.sample(sorted(QUESTION), draw.randint(1, 3))
        yield json.dumps({**QUESTION, **{each: draw.choice(WRONG) for each in fields}}).encode()
        yield json.dumps(
            {**QUESTION, "reply_to": {**REPLY_TO, draw.choice(sorted(REPLY_TO)): draw.choice(WRONG)}}
        ).encode()


def test_a_message_of_any_form_is_obeyed_or_refused(commands, published):
    for body in nonsense(seed=1):
        commands._allowed._tokens = 100
        with contextlib.suppress(Refused):
            send(commands, body)
    send(commands, QUESTION)
    assert published[-1][0] == {NAME: {"where": NAME}}
    assert {exchange for _, exchange, _, _ in published} == {REPLY_TO["exchange"]}


def test_what_is_no_command_is_refused(commands):
    for body in (b"[]", b"null", b"{}", b'{"method": ["where"]}', b'{"method": "where", "destination": "one@mini"}'):
        assert refused(commands, body) == NO_COMMAND


def test_of_a_flood_a_few_commands_are_obeyed(commands, called):
    commands._allowed = TokenBucket(0.001, 2)
    send(commands, COMMAND)
    send(commands, COMMAND)
    assert refused(commands, COMMAND) == TOO_FAST
    assert len(called) == 2


def test_a_flood_of_commands_for_others_delays_none_for_this_node(commands, called):
    for _ in range(3 * COMMANDS_AT_ONCE):
        send(commands, {**COMMAND, "destination": ["two@mini"]})
    send(commands, COMMAND)
    assert called == [NAME]
