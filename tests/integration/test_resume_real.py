"""A real mlx_lm.server goes on with an answer that was cut, and the joined text is the uncut one."""

import pytest

from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.host.child_process import child, python
from fleet_worker.protocol.request import Resume
from tests.brokers import free_port, missing
from tests.mlx_clients import Client

pytestmark = [pytest.mark.timeout(300), pytest.mark.rest]  # the first run downloads the model

QUESTION = [{"role": "user", "content": "Write a poem about the sea and a storm."}]
LENGTH = 16


@pytest.fixture(scope="module")
def client():
    if problem := platform_problem():
        missing(problem)
    port, folder = free_port(), str(chat_model(lambda *_: None))
    command = python("-m", "mlx_lm", "server", "--model", folder, "--host", "127.0.0.1", "--port", str(port))
    with child("mlx_lm.server", command, {"HF_HUB_OFFLINE": "1"}) as process:
        process.wait_for("Starting httpd", 120)
        client = Client(f"http://127.0.0.1:{port}", server="mlx_lm", model={"backend": folder})
        try:
            yield client
        finally:
            client.close()


@pytest.fixture(scope="module")
def uncut(client):
    """The pieces of the whole answer, and how it ended."""
    deltas, _, answer = client.stream(QUESTION, max_tokens=LENGTH)
    return [delta.content for delta in deltas], answer


@pytest.mark.parametrize("count", [1, 9, LENGTH - 1])
def test_an_answer_goes_on_after_any_token(client, uncut, count):
    """It is interrupted there, and goes on by another request."""
    pieces, whole = uncut
    delivered = []
    with client.open(QUESTION, max_tokens=LENGTH) as stream:
        for deltas in stream:
            delivered += [delta.content for delta in deltas]
            if len(delivered) >= count:
                break
    assert delivered == pieces[: len(delivered)]
    resume = Resume(content="".join(delivered), tokens=len(delivered))
    _, rest, answer = client.stream(QUESTION, max_tokens=LENGTH, resume=resume)
    assert resume.content + rest["content"] == "".join(pieces)
    assert answer.finish_reason == whole.finish_reason
    assert answer.usage.completion_tokens == whole.usage.completion_tokens
    assert abs(answer.usage.prompt_tokens - whole.usage.prompt_tokens) <= 2


def test_a_prompt_that_the_server_has_cached_does_not_kill_it(client):
    """The same answer was asked for before, and no longer than what was delivered."""
    question = [{"role": "user", "content": "Tell me about storms."}]
    for count in (1, 3):
        _, short, answer = client.stream(question, max_tokens=count)
        assert answer.finish_reason == "length"
        resume = Resume(content=short["content"], tokens=count)
        _, rest, _ = client.stream(question, max_tokens=count + 4, resume=resume, temperature=0.01)
        assert rest["content"]
        assert client.health().ready
