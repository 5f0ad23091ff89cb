"""What comes through the door of a broker's messages, as bytes, and what does not."""

import base64
import bz2
import json
import logging
import tracemalloc
import zlib

import pytest

from fleet_worker.broker.door import (
    COMPRESSED,
    EMPTY,
    FOREIGN,
    MOST_VALUES,
    NOT_JSON,
    Door,
    Refused,
    read_json,
)

MOST = 1024 * 1024
BODY = {"text": "hello", "numbers": [1, 2.5]}
SECRET = "swordfish"
BOMB = zlib.compress(b" " * 50_000_000)


def wrapped(content=None, /, **changes):
    """A message as kombu's Redis transport wraps it."""
    content = json.dumps(BODY).encode() if content is None else content
    message = {
        "body": base64.b64encode(content).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": {"body_encoding": "base64", "delivery_tag": "x", "delivery_info": {}, "priority": 0},
    }
    return json.dumps(message | changes).encode()


def opened(item):
    body, headers = Door(MOST).unwrap(item, MOST)
    return read_json(body), headers


def refused(item):
    with pytest.raises(Refused) as caught:
        opened(item)
    assert SECRET not in f"{caught.value} {caught.value.kind} {caught.value.detail}"
    return caught.value.kind


def test_a_message_of_ours_comes_through():
    assert opened(wrapped(headers={"task": "fleet.chat"})) == (BODY, {"task": "fleet.chat"})


@pytest.mark.parametrize("item", [b"", b" " * 2 * MOST, wrapped(b"9" * (MOST + 1))])
def test_a_size_that_no_message_of_ours_has(item):
    assert refused(item) == EMPTY


@pytest.mark.parametrize(
    "item",
    [b"[", b"\xff", b"{'a': 1}", b"[" * 40_000, b"\x80\x04K\x05.", b"\xef\xbb\xbf{}", b'"\\ud83d"', b"{}{}", b"01"],
)
def test_what_is_not_json(item):
    assert refused(item) == NOT_JSON
    assert refused(wrapped(item)) == NOT_JSON


@pytest.mark.parametrize(
    "changes",
    [
        *({"content-type": each} for each in (None, "", ["application/json"], {}, 5, "application/data", "text/plain")),
        *({"content-type": each} for each in ("application/x-python-serialize", "application/json; charset=utf-8")),
        *({"content-encoding": each} for each in ("bz2_codec", "binary", "utf-16", "rot13", "zlib", [], 5, {"a": 1})),
        *({"properties": each} for each in (None, [], "x", {}, {"body_encoding": ["base64"]}, {"body_encoding": "x"})),
        *({"body": each} for each in (5, ["x"], {"a": 1}, {"__type__": "bytes", "__value__": "{}"})),
        *({"headers": each} for each in ("x", [1], 5)),
    ],
)
def test_what_is_wrapped_in_another_way(changes):
    assert refused(wrapped(**changes)) == FOREIGN


def test_a_large_message_comes_through_without_a_copy_of_its_body():
    text = "x" * (MOST - 100)
    item = wrapped(json.dumps({"text": text}).encode(), headers={"task": "fleet.chat"})
    tracemalloc.start()
    try:
        assert opened(item) == ({"text": text}, {"task": "fleet.chat"})
        assert tracemalloc.get_traced_memory()[1] < 2.2 * MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", ['"', "\\u0041", "A", "=", '\\"', " "])
def test_a_large_body_that_is_not_base64(end):
    assert refused(wrapped(body="A" * 100_001 + end)) in (NOT_JSON, FOREIGN)
    assert refused(b'{"body": "' + b"A" * 100_000) in (NOT_JSON, FOREIGN)
    assert refused(b'{"body": "' + b"A" * 100_000 + b'", "body": 5}') == FOREIGN


@pytest.mark.parametrize("item", [b"null", b"5", b"[]", b'"x"', b"true", b"{}", b'{"body": ""}'])
def test_what_is_not_wrapped(item):
    assert refused(item) == FOREIGN


@pytest.mark.parametrize("body", ["===", "a", "e30", "e30=\n", "\u00e4", "e30= ", "%%%%", ""])
def test_a_body_that_is_not_base64_of_something(body):
    assert refused(wrapped(body=body)) in (NOT_JSON, EMPTY)


@pytest.mark.parametrize("name", ["application/x-gzip", "zlib", "bzip2", "lzma", "zstd", "x", 5, ["gzip"]])
def test_nothing_is_decompressed(name):
    assert refused(wrapped(BOMB, headers={"compression": name})) == COMPRESSED
    assert refused(wrapped(bz2.compress(b"{}"), headers={"compression": name})) == COMPRESSED


def test_headers_are_a_few_short_ones():
    strange = {"list": [1], "object": {}, "none": None, "long": "x" * 1001, "big": 10**40, "x" * 1001: "y"}
    kept = {"text": "x" * 1000, "number": 2**63, "float": 0.5, "truth": True}
    assert opened(wrapped(headers={**strange, **kept}))[1] == kept
    assert len(opened(wrapped(headers={f"h{n}": n for n in range(1000)}))[1]) == 50


def test_json_arrives_as_it_was_sent():
    typed = {"__type__": "uuid", "__value__": {"hex": "0" * 32}}
    for value in (typed, {"__type__": "bytes", "__value__": "x"}, {"__type__": "nothing", "__value__": 1}):
        assert opened(wrapped(json.dumps([value]).encode()))[0] == [value]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b"1e400", float("inf")),
        (b"-1e400", float("-inf")),
        (b"123456789012345678901234567890", 123456789012345678901234567890),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\u0000"', "\0"),
        (b"-0.0", 0.0),
    ],
)
def test_what_json_does_not_define_is_defined(text, value):
    assert read_json(text) == value


@pytest.mark.parametrize("text", [b"9" * 4301, b'"\\ud83d"', b'"\\ude00\\ud83d"', b'"\xed\xa0\x80"'])
def test_what_cannot_be_told_apart_later_is_refused(text):
    with pytest.raises(Refused, match="not JSON"):
        read_json(text)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * MOST_VALUES + b"[]]",
        b"[" + b"1," * MOST_VALUES + b"1]",
        b"[" + b'"",' * MOST_VALUES + b'""]',
        b"[" + b'"\\"",' * MOST_VALUES + b'""]',
        b"[" + b'{"a":1},' * (MOST_VALUES // 2) + b"1]",
    ],
)
def test_a_small_body_of_many_values_is_refused(body):
    with pytest.raises(Refused, match="JSON values"):
        Door(2 * MOST).check(body, {}, content_type="application/json", content_encoding="utf-8", most_bytes=2 * MOST)


@pytest.mark.parametrize("text", ["a, b" * 200_000, '[{"a": 1}, ' * 80_000, '\\"[,' * 100_000, "[,\\\\" * 100_000])
def test_a_text_may_hold_any_number_of_commas_and_brackets(text):
    body = json.dumps({"text": text, "more": [text[:10]]}).encode()
    checked, _ = Door(9 * MOST).check(
        body, None, content_type="application/json", content_encoding="utf-8", most_bytes=9 * MOST
    )
    assert read_json(checked)["text"] == text


def test_the_most_values_take_little_memory():
    body = b"[" + b",".join(b'{"%d":%d.5}' % (n, n) for n in range(MOST_VALUES // 2 - 1)) + b"]"
    tracemalloc.start()
    try:
        assert len(read_json(body)) == MOST_VALUES // 2 - 1
        assert tracemalloc.get_traced_memory()[1] < 50 * MOST
    finally:
        tracemalloc.stop()


def test_each_kind_is_counted_and_logged_once_a_minute(caplog):
    now = [0.0]
    door = Door(MOST, clock=lambda: now[0])
    for _ in range(1000):
        door.drop(Refused(NOT_JSON, f"{SECRET}\n" * 1000))
    door.drop(Refused(FOREIGN))
    assert door.dropped == {NOT_JSON: 1000, FOREIGN: 1}
    assert [len(record.getMessage()) < 300 for record in caplog.records] == [True, True]
    assert "\n" not in caplog.text.strip().replace("\nERROR", "")
    now[0] = 61.0
    door.drop(Refused(NOT_JSON))
    assert "999 others" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.ERROR
