"""A node that is asked to go on with a stream sends what comes after that which was delivered."""

import pytest

from fleet_worker import StreamInterrupted
from fleet_worker.protocol.request import FleetRequest, Resume
from fleet_worker.simulator import reply_tokens
from tests.flow.conftest import CHAT, work

HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = reply_tokens(HELLO, 32)


@pytest.fixture
def resume(monkeypatch):
    """Makes every request one that goes on with an answer of which this was delivered."""

    def with_what_was_delivered(**delivered):
        def submitted(request, *where):
            return addressed_to(request, *where).model_copy(update={"resume": Resume(**delivered)})

        monkeypatch.setattr(FleetRequest, "addressed_to", submitted)

    addressed_to = FleetRequest.addressed_to
    return with_what_was_delivered


@pytest.mark.parametrize(("temperature", "last"), [(0, "user"), (0.7, "assistant")])
def test_a_node_sends_the_rest_of_an_answer(node, router, mlx, resume, temperature, last):
    """At temperature 0 its server generates all of it again, else it continues the text."""
    resume(content="".join(TOKENS[:10]), tokens=10)
    with router.stream_chat(CHAT, HELLO, temperature=temperature, timeout=20) as stream:
        assert [delta.content for delta in stream] == TOKENS[10:]
    assert stream.response.usage.completion_tokens == 32
    assert work(mlx)[-1].body["messages"][-1]["role"] == last


def test_a_node_that_cannot_go_on_says_so_before_it_asks_its_server(node, router, mlx, resume):
    seen = len(work(mlx))
    resume(reasoning="Hm", tokens=1)
    with pytest.raises(StreamInterrupted), router.stream_chat(CHAT, HELLO, temperature=0.5, timeout=20) as stream:
        next(stream)
    assert len(work(mlx)) == seen
