"""What the clients of a gateway notice when a node, an MLX server, the broker or the gateway itself is killed."""

import signal
import threading

import openai
import pytest

from tests.brokers import any_broker
from tests.fleets import Fleet, conversation, until
from tests.gateways import running_gateway

pytestmark = [pytest.mark.rest, pytest.mark.timeout(150)]

NATURAL = 60
FLAVOURS = {"one": "vllm_batched", "two": "vllm_batched"}


@pytest.fixture(scope="module")
def made(broker):
    with Fleet(broker.url, FLAVOURS, natural=NATURAL, token_interval=0.05) as fleet:
        yield fleet


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setenv("FLEET_ROUTER__LOST_AFTER", "2")


@pytest.fixture
def gateway(broker, patient, made):
    with running_gateway(broker.url) as gateway:
        yield gateway


@pytest.fixture
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def fleet(made, client):
    """All of it works, and the gateway knows."""
    for part in made.parts:
        if part.ended:
            part.start()
    for part in made.parts:
        part.wait_until_ready()
    with_node = {name: {"x-fleet-node": made.node_name(name)} for name in made.nodes}
    for name in made.nodes:
        until(lambda name=name: answers(client, made.model, with_node[name]), 30)
    return made


def answers(client, model, headers):
    try:
        said = conversation("proof")
        client.chat.completions.create(model=model, messages=said, max_tokens=1, extra_headers=headers, timeout=5)
    except openai.APIError:
        return False
    return True


class Reader(threading.Thread):
    """Reads one stream through the SDK."""

    def __init__(self, client, fleet, of):
        super().__init__()
        self.text, self.roles, self.ids, self.error, self.finish = "", [], set(), None, None
        self.begun = threading.Event()
        self._client, self._fleet, self._messages = client, fleet, conversation(of)
        self.expected = fleet.expected(self._messages, NATURAL)
        self.start()

    def run(self):
        try:
            asked = {"model": self._fleet.model, "messages": self._messages, "stream": True}
            asked["extra_headers"] = {"x-fleet-queue-timeout": "10"}
            for chunk in self._client.chat.completions.create(**asked):
                self._read(chunk)
        except openai.APIError as error:
            self.error = error

    def _read(self, chunk):
        choice = chunk.choices[0]
        self.ids.add((chunk.id, chunk.created, chunk.model))
        self.roles.append(choice.delta.role)
        self.text += choice.delta.content or ""
        self.finish = choice.finish_reason or self.finish
        if len(self.text) > 40:
            self.begun.set()


def read(client, fleet, number, of):
    """Begin so many streams, and return them when something of each has arrived."""
    readers = [Reader(client, fleet, f"{of} {each}") for each in range(number)]
    assert all(reader.begun.wait(20) for reader in readers)
    return readers


def assert_nothing_was_noticed(readers):
    for reader in readers:
        reader.join(60)
        assert (reader.error, reader.text, reader.finish) == (None, reader.expected, "stop")
        assert len(reader.ids) == 1
        assert reader.roles == ["assistant"] + [None] * (len(reader.roles) - 1)


def test_what_a_killed_gateway_asked_for_is_not_worked_on_for_long(client, fleet, gateway):
    readers = read(client, fleet, 6, "the gateway")
    gateway.signal(signal.SIGKILL)
    assert until(lambda: not fleet.busy(), 10) < 2.5
    for reader in readers:
        reader.join(10)
        assert isinstance(reader.error, openai.APIError)


def test_nobody_notices_that_a_node_was_killed(client, fleet):
    readers = read(client, fleet, 6, "a node")
    fleet.nodes[fleet.busy()[0]].kill()
    assert_nothing_was_noticed(readers)


@any_broker
def test_nobody_notices_that_an_mlx_server_was_killed(client, fleet):
    readers = read(client, fleet, 6, "a server")
    fleet.servers[fleet.busy()[0]].kill()
    assert_nothing_was_noticed(readers)


@any_broker
def test_without_another_node_a_stream_ends_with_an_error(client, fleet, gateway):
    readers = read(client, fleet, 4, "all nodes")
    for part in (*fleet.nodes.values(), *fleet.servers.values()):
        part.kill()
    for reader in readers:
        reader.join(60)
        assert isinstance(reader.error, openai.APIError)
        assert reader.expected.startswith(reader.text)
    assert "Traceback" not in gateway.output


def test_nobody_notices_that_the_broker_was_restarted(client, fleet, broker):
    readers = read(client, fleet, 6, "the broker")
    broker.stop()
    broker.start()
    assert_nothing_was_noticed(readers)
