"""The word that `fleet-worker invite` prints."""

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.errors import ConfigurationError
from fleet_worker.setup.invitation import Invitation, Membership, decode

PASSWORD = "hush-hush"
INVITATION = Invitation(
    broker_url="redis://mini-1.local:6379/0", id="00ff" * 4, secret=PASSWORD, other_address="10.0.0.1"
)
WORD = INVITATION.encode()


def refused(line):
    with pytest.raises(ConfigurationError) as caught:
        decode(line)
    assert PASSWORD not in caught.value.message
    return caught.value.message


def test_it_is_one_word_of_letters_and_digits_which_is_read_back():
    assert WORD.isalnum()
    assert decode(WORD) == INVITATION


@pytest.mark.parametrize(
    "line",
    [
        f"fleet-worker join {WORD}",
        f"fleet-worker join {WORD} --up",
        f"fleet-worker join {WORD} —up",
        f"  /opt/venv/bin/fleet-worker join {WORD}\n",
        f"'{WORD}'",
        WORD.lower(),
        f"{WORD[:70]}\n  {WORD[70:]}",
    ],
    ids=["whole line", "with an option", "with a dash", "with a path", "quotes", "lower case", "broken into two lines"],
)
def test_what_copying_does_to_it_changes_nothing(line):
    assert decode(line) == INVITATION


@given(st.integers(0, len(WORD) - 1), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567089-_ü"))
def test_a_wrong_character_is_noticed_or_changes_nothing(place, character):
    try:
        read = decode(WORD[:place] + character + WORD[place + 1 :])
    except ConfigurationError:
        return
    assert read == INVITATION


@given(st.text(max_size=300))
def test_any_other_text_is_none(text):
    refused(text)
    refused("fleet1P" + text)


@pytest.mark.parametrize("cut", [10, 50, len(WORD) - 1])
def test_a_part_of_it_is_damaged(cut):
    assert "is damaged: copy the whole line again" in refused(WORD[:cut])


@pytest.mark.parametrize("line", ["fleet1", "fleet1XYZ", "fleet-worker join FLEET1 --up"])
def test_what_begins_like_one_is_damaged(line):
    assert "is damaged: copy the whole line again" in refused(line)


def test_another_version_is_told():
    assert "of another version, fleet2: install the same" in refused(WORD.replace("fleet1", "fleet2"))


def word(content):
    return "fleet1" + base64.b32encode(zlib.compress(content)).decode().rstrip("=")


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"\xff",
        b'{"broker_url": "redis://h/0"}',
        b'{"broker_url": "http://h/0", "id": "00", "secret": "s"}',
        b'{"broker_url": "redis://h/0", "id": "*", "secret": "s"}',
        b'{"broker_url": "redis://h/0", "id": "00", "secret": "s", "more": 1}',
        b"[" * 50_000,
        b" " * 10_000_000,
    ],
    ids=["list", "empty", "bytes", "no secret", "no broker", "pattern", "unknown key", "deep", "bomb"],
)
def test_what_no_invite_has_made_is_damaged(content):
    assert "is damaged" in refused(word(content))


def test_no_text_of_it_shows_a_secret():
    membership = Membership(broker_url=f"redis://:{PASSWORD}@mini-1/0", max_body_bytes=1024, affinity_secret=PASSWORD)
    opened = Invitation(broker_url="redis://mini-1/0", membership=membership)
    assert PASSWORD not in f"{INVITATION!r} {opened!r} {membership!r}"
    assert decode(opened.encode()).membership == membership
