"""Which call a fragment belongs to, where servers do not number, name or identify their calls by the book."""

import json

import pytest

from fleet_worker.errors import MalformedOutput
from fleet_worker.mlx.tool_calls import ToolCalls
from fleet_worker.protocol.reply import Delta, join


def call(name="f", arguments="{}", **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def rest(arguments, **more):
    return {"function": {"arguments": arguments}, **more}


def read(*deltas):
    """(id, name, arguments) of each call; each of `deltas` is the `tool_calls` of one delta."""
    calls = ToolCalls()
    whole = join(Delta(tool_calls=calls.numbered(fragments)) for fragments in deltas)["tool_calls"]
    return [(each.get("id"), each["function"]["name"], each["function"]["arguments"]) for each in whole]


ONE, TWO = ("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')
NAMELESS = [(None, *ONE[1:]), (None, *TWO[1:])]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("index", [{"index": 0}, {"index": None}, {}, {"index": "0"}, {"index": -1}])
def test_a_new_id_begins_a_call_whatever_its_number_is(index, together):
    first, second = call("f", '{"x":1}', id="a", **index), call("g", '{"y":2}', id="b", **index)
    assert read(*([[first, second]] if together else [[first], [second]])) == [ONE, TWO]


@pytest.mark.parametrize("index", [{"index": 0}, {"index": None}, {}])
@pytest.mark.parametrize("repeated", [{"id": "a"}, {}])
def test_an_id_comes_with_the_first_fragment_or_with_each(index, repeated):
    assert read(
        [call("f", "", id="a", **index)],
        [rest('{"x":', **index, **repeated)],
        [rest("1}", **index, **repeated)],
        [call("g", "", id="b", **index)],
        [rest('{"y":2}', **index)],
    ) == [ONE, TWO]


def test_fragments_of_two_calls_with_one_number_are_told_apart_by_their_ids():
    assert read(
        [call("f", "", index=0, id="a")],
        [call("g", "", index=0, id="b")],
        [rest('{"x":1}', index=0, id="a")],
        [rest('{"y":2}', index=0, id="b")],
    ) == [ONE, TWO]


def test_an_id_may_come_late():
    assert read(
        [call("f", "", index=0)], [rest('{"x":1}', index=0, id="a")], [call("g", '{"y":2}', index=1, id="b")]
    ) == [
        ONE,
        TWO,
    ]


def test_an_id_that_is_made_up_for_every_fragment_is_none():
    """Older vLLM does that. The number is the same then, and the name is left out."""
    first = call("f", "", index=0, id="a")
    pieces = enumerate(('{"x":', "1}", ""))
    fragments = [first, *(rest(piece, index=0, id=f"a{at}") for at, piece in pieces)]
    assert read(*([each] for each in fragments)) == [ONE]
    assert read(*([each] for each in fragments), [call("g", '{"y":2}', index=1, id="b2")]) == [ONE, ("b2", *TWO[1:])]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("index", [{"index": None}, {}])
def test_without_ids_and_numbers_a_name_begins_a_call(index, together):
    calls = [call("f", '{"x":1}', **index), call("g", '{"y":2}', **index), call("g", '{"y":2}', **index)]
    assert read(*([calls] if together else [[each] for each in calls])) == [*NAMELESS, NAMELESS[1]]
    assert read([call("f", "", **index)], [call("g", "", **index)]) == [(None, "f", ""), (None, "g", "")]


@pytest.mark.parametrize("index", [{"index": 0}, {}])
def test_without_ids_whole_calls_with_one_number_are_told_apart(index):
    assert read([call("f", '{"x":1}', **index)], [call("g", '{"y":2}', **index)]) == NAMELESS
    assert read([call("f", "{}", **index)], [call("f", '{"x":1}', **index)]) == [(None, "f", "{}"), NAMELESS[0]]


@pytest.mark.parametrize("index", [{"index": 0}, {}])
@pytest.mark.parametrize("identity", [{"id": "a"}, {}])
def test_a_name_that_is_repeated_is_said_once(index, identity):
    expected = [(identity.get("id"), "f", '{"x":1}')]
    assert read([call("f", "", **identity)], [call("f", '{"x":', **index)], [call("f", "1}", **index)]) == expected
    assert read([call("f", None, **identity)], [call("f", '{"x":1}', **index, **identity)]) == expected


def test_a_name_may_come_in_pieces():
    assert read([call("get_", "", index=0)], [call("weather", "", index=0)], [rest("{}", index=0)]) == [
        (None, "get_weather", "{}")
    ]


def test_fragments_leave_with_the_number_of_their_call():
    calls = ToolCalls()
    assert calls.numbered([call("f", "{}", index=4, id=7)]) == [call("f", "{}", index=0, id="7")]
    assert calls.numbered([rest("1", index=4, id=["odd"])]) == [rest("1", index=0, id="7")]
    assert calls.numbered([call("g", {"x": "ü"}, index=10**30)]) == [call("g", '{"x": "ü"}', index=1)]


def test_calls_without_end_are_refused():
    calls = ToolCalls()
    with pytest.raises(MalformedOutput, match="more than 1000"):
        calls.numbered([call(index=at) for at in range(2000)])
    with pytest.raises(MalformedOutput, match="more than 1000"):
        ToolCalls().numbered([call(index=at, id="a") for at in range(2000)])


ENDLESS = [
    [rest("x" * 100_000, index=0)] * 50,
    [call(name, "", index=0) for name in ("f" * 100, "g" * 100)] * 50,
    [call("f", '{"x": "' + "{}" * 1000, index=0)] * 5000,
]


@pytest.mark.parametrize("fragments", ENDLESS, ids=["arguments", "names", "both"])
def test_names_and_arguments_without_end_are_refused(fragments):
    calls = ToolCalls()
    with pytest.raises(MalformedOutput, match="too large"):
        calls.numbered(fragments)


def test_an_argument_may_be_an_object_in_an_object():
    assert read([call("f", {"a": {"b": [1, None]}})]) == [(None, "f", json.dumps({"a": {"b": [1, None]}}))]


@pytest.mark.parametrize("written", [str, float])
def test_a_number_may_be_written_in_another_way(written):
    """Calls that come in turns are told apart by it alone."""
    zero, one = {"index": written(0)}, {"index": written(1)}
    begun = [call("f", '{"x"', id="a", **zero), call("g", '{"y"', id="b", **one)]
    assert read(begun, [rest(":1}", **zero), rest(":2}", **one)]) == [ONE, TWO]


@pytest.mark.parametrize("index", ["١", "-1", "9" * 5000, "x", 0.5, float("inf"), True, [0]])
def test_what_is_no_number_is_left_out(index):
    assert read([call("f", '{"x"', id="a", index=index)], [rest(":1}", index=index)]) == [ONE]


@pytest.mark.parametrize("together", [True, False])
def test_calls_that_share_their_id_are_told_apart_by_number_and_name(together):
    first, second = call("f", '{"x":1}', id="a", index=0), call("g", '{"y":2}', id="a", index=1)
    assert read(*([[first, second]] if together else [[first], [second]])) == [ONE, ("a", *TWO[1:])]


def test_a_call_may_be_flat():
    assert read([{"name": "f", "arguments": '{"x":1}', "id": "a"}]) == [ONE]
    assert read([{"name": "f", "id": "a", "index": 0}], [{"arguments": {"x": 1}, "index": 0}]) == [
        ("a", "f", '{"x": 1}')
    ]


def test_a_call_without_a_name_is_noticed():
    calls = ToolCalls()
    calls.numbered([rest("{}", id="a")])
    assert calls.any_nameless
    calls.numbered([call("f", "", id="a")])
    assert not calls.any_nameless
