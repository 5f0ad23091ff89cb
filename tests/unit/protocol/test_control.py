"""What a router sends to nodes besides requests."""

import pytest

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.control import ControlMessage


def test_a_control_message_travels_whole():
    for said in (ControlMessage(node="n@h", cancelled=[("a", 1), ("b", 2)]), ControlMessage(cancelled=[("c", 3)])):
        assert ControlMessage.decode(said.encode()) == said
    with pytest.raises(InvalidRequest, match="not a valid ControlMessage"):
        ControlMessage.decode(b'{"cancelled": [1]}')


def test_what_a_newer_router_adds_is_ignored():
    assert ControlMessage.decode(b'{"missed":"a","novelty":1}') == ControlMessage(missed="a")
