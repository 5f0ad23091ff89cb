"""Digests of prompt caches: what is accepted as one, and that nothing unbounded or readable is."""

import json

import pytest
from pydantic import ValidationError

from fleet_worker.errors import InvalidRequest
from fleet_worker.protocol.cache_digest import MOST_DIGESTS, MOST_HELD, CacheDigest, DigestMessage, DigestsWanted

ID = "iB4CYvjf5XQ"
DIGEST = CacheDigest(node="local@mini", slots=4, running=1, prefill_speed=262.5, epoch=3, held=[ID])


def message(*, digests=None, **fields):
    """A message as another version, or a stranger, might send it."""
    said = json.loads(DigestMessage(v=1, host="mini", interval=1.0, digests=[DIGEST]).encode())
    of_node = {**said["digests"][0], **fields}
    return json.dumps({**said, "digests": [of_node] if digests is None else digests})


def test_a_digest_arrives_as_it_was_sent():
    """Also speeds that were never measured, and fields of a newer version."""
    assert DigestMessage.decode(message(new="field")).digests == [DIGEST]


@pytest.mark.parametrize(
    "fields",
    [
        {"held": [ID] * (MOST_HELD + 1)},
        {"held": ["Tell me about the sea."]},
        {"held": ["iB4CYvjf5X\n"]},
        {"held": [1]},
        {"running": -1},
        {"prefill_left": 1e300},
        {"prefill_speed": -1.0},
        {"epoch": 2**64},
        {"node": "n" * 256},
        {"digests": [json.loads(DIGEST.model_dump_json())] * (MOST_DIGESTS + 1)},
    ],
    ids=str,
)
def test_what_is_no_digest_is_refused(fields):
    """Counts, lengths and the form of an id are bounded."""
    with pytest.raises(InvalidRequest):
        DigestMessage.decode(message(**fields))


@pytest.mark.parametrize("fields", [{"v": 2}, {"hosts": -1}, {"hosts": 10**9}, {"seconds": 0}, {"seconds": None}])
def test_a_question_for_digests_is_bounded(fields):
    """A number of hosts that no fleet has would silence all of them."""
    said = {"v": 1, "hosts": 3, "seconds": 90.0}
    assert DigestsWanted.decode(json.dumps(said)).hosts == 3
    with pytest.raises(InvalidRequest):
        DigestsWanted.decode(json.dumps({**said, **fields}))


def test_the_old_question_is_none_for_digests():
    """`{}` asks for the whole status."""
    with pytest.raises(InvalidRequest):
        DigestsWanted.decode(b"{}")


def test_a_digest_of_text_cannot_be_made():
    """A node that has confused an id with what it stands for fails, and says nothing."""
    with pytest.raises(ValidationError):
        CacheDigest(node="local@mini", slots=1, running=0, held=["Tell me a s"])
