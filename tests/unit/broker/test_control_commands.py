"""Which commands of Celery's remote control a node obeys, from whom, and what it replies. No broker."""

import json
import random
import re
from types import SimpleNamespace

import pytest
from celery.worker.control import Panel
from kombu.exceptions import InconsistencyError

from fleet_worker import Settings
from fleet_worker.broker import control_commands as module
from fleet_worker.broker.app import create_app
from fleet_worker.broker.control_commands import COMMANDS_AT_ONCE, EVENTS_ARE_ON, LOOKS, ControlCommands

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
    commands.receive(SimpleNamespace(body=json.dumps(command).encode()))


def replies(commands, published, **fields):
    send(commands, {**QUESTION, **fields})
    return [body[NAME] for body, *_ in published]


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


@pytest.mark.parametrize("pattern", ["(.*)*$", ".*", NAME])
def test_a_pattern_is_not_obeyed_since_an_expression_may_never_end(commands, called, pattern):
    send(commands, {**COMMAND, "destination": None, "pattern": pattern, "matcher": "pcre"})
    assert called == []


@pytest.mark.parametrize("name", sorted(Panel.data.keys() - {*LOOKS, EVENTS_ARE_ON}))
def test_each_other_command_of_celery_is_refused_in_a_clear_answer(commands, published, name, monkeypatch):
    monkeypatch.setitem(Panel.data, name, lambda *_, **__: pytest.fail("it was executed"))
    (reply,) = replies(commands, published, method=name)
    assert reply["error"].startswith("a node does not obey this command; it obeys: active, active_queues, conf, ")


def test_commands_that_celery_does_not_have_are_refused_alike_and_their_names_are_not_logged(
    commands, published, caplog
):
    assert "does not obey" in replies(commands, published, method="secret")[0]["error"]
    assert caplog.text == ""


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


WRONG = ["", "x", "\ud800", [], [[]], {}, {"a": []}, 0, 1, -1, 1.5, True, 10**400, "y" * 300, ["\ud800"], [1], [None]]


def nonsense(seed):
    """Messages that differ from a question in some fields, or are none at all."""
    draw = random.Random(seed)
    yield from (b"", b"[]", b"null", b"\xff", b"1", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"x" * 300_000, b"\0")
    yield from (None, 1, [], {}, memoryview(b"{}"))
    yield json.dumps({**QUESTION, "destination": [1] * 100_000}).encode()
    yield json.dumps({**QUESTION, "destination": ["x"] * 10_000}).encode()
    for _ in range(300):
        fields = draw.sample(sorted(QUESTION), draw.randint(1, 3))
        yield json.dumps({**QUESTION, **{each: draw.choice(WRONG) for each in fields}}).encode()
        yield json.dumps(
            {**QUESTION, "reply_to": {**REPLY_TO, draw.choice(sorted(REPLY_TO)): draw.choice(WRONG)}}
        ).encode()


def test_no_message_is_an_error_or_is_quoted_and_few_are_logged(commands, published, called, caplog):
    for body in nonsense(seed=1):
        commands._allowed._tokens = 100
        commands.receive(SimpleNamespace(body=body))
    send(commands, QUESTION)
    assert published[-1][0] == {NAME: {"where": NAME}}
    assert {exchange for _, exchange, _, _ in published} == {REPLY_TO["exchange"]}
    assert len(caplog.records) <= 2
    assert re.search("yyy|xxx|1.5", caplog.text) is None


def test_a_flood_is_dropped_and_logged_once(commands, called, caplog):
    for _ in range(3 * COMMANDS_AT_ONCE):
        send(commands, COMMAND)
    assert COMMANDS_AT_ONCE <= len(called) < 2 * COMMANDS_AT_ONCE
    assert caplog.text.count("control commands come too fast") == 1


def test_a_flood_of_commands_for_others_delays_none_for_this_node(commands, called):
    for _ in range(3 * COMMANDS_AT_ONCE):
        send(commands, {**COMMAND, "destination": ["two@mini"]})
    send(commands, COMMAND)
    assert called == [NAME]
