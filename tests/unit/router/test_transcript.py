"""What a stream has delivered, kept as its texts."""

import gc

from fleet_worker.protocol.reply import Delta, join
from fleet_worker.router.transcript import Transcript


def fragment(arguments, **more):
    return {"index": 0, "function": {"arguments": arguments}, **more}


SAID = [
    Delta(reasoning="Let me "),
    Delta(reasoning="think. "),
    Delta(content="The "),
    Delta(resumed=True),
    Delta(content="sea"),
    Delta(content=" is", reasoning="wide"),
    Delta(tool_calls=[fragment('{"a"', id="1")]),
    Delta(tool_calls=[fragment(": 1}")]),
]


def transcript_of(deltas):
    transcript = Transcript()
    transcript.add(deltas)
    return transcript


def test_all_that_was_said_is_in_it_in_its_order():
    transcript = transcript_of(SAID)
    assert transcript.deltas() == [
        Delta(reasoning="Let me think. "),
        Delta(content="The "),
        Delta(resumed=True),
        Delta(content="sea"),
        Delta(reasoning="wide"),
        Delta(content=" is"),
        Delta(tool_calls=[fragment('{"a"', id="1"), fragment(": 1}")]),
    ]
    assert transcript.whole() == join(SAID)


def test_what_is_packed_is_the_same():
    transcript, same = transcript_of(SAID), transcript_of(SAID)
    same.pack()
    assert same.deltas() == transcript.deltas()
    assert same.whole() == join(SAID)


def test_it_counts_the_characters_of_the_content_and_knows_of_tool_calls():
    assert transcript_of(SAID).characters == len("The sea is")
    assert transcript_of(SAID).has_tool_calls
    assert not transcript_of(SAID[:6]).has_tool_calls


def test_nothing_was_delivered_by_deltas_without_content():
    assert not transcript_of([])
    assert not transcript_of([Delta()])
    assert transcript_of(SAID[:1])


def test_the_garbage_collector_has_nothing_to_visit_for_each_delta():
    transcript = transcript_of([Delta(content="The ")])
    gc.collect()
    before = len(gc.get_objects())
    for number in range(1_000):
        transcript.add([Delta(content=f"{number} ")])
    gc.collect()
    assert len(gc.get_objects()) - before < 100
