"""What a server's prompt cache is believed to hold. In these tests the letters of a word are the messages of a prompt:
"ab" and "ac" begin with the same one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.node.prompt_cache.shadow import EVICTED, Shadow
from fleet_worker.protocol.cache_digest import MOST_HELD
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

BYTES = 1_000
"""Of each message."""
WORDS = st.text("abc", min_size=1, max_size=6)


def prompt(word, session=None):
    chain = tuple((word[:length], length * BYTES) for length in range(1, len(word) + 1))
    return PromptPrefixes(session, None, chain)


def shadow(*answered, sequences=3):
    it = Shadow(sequences)
    for word in answered:
        it.answered(prompt(word))
    return it


def held(it, word):
    """How many messages of this prompt are believed to be cached."""
    return it.match(prompt(word)) // BYTES


def test_any_beginning_of_an_answered_prompt_is_held():
    it = shadow("abc")
    assert [held(it, word) for word in ("abcd", "abx", "a", "x", "bc")] == [3, 2, 1, 0, 0]


def test_the_oldest_goes_first_and_a_hit_refreshes_nothing():
    it = shadow("a1", "b1", "c1")
    assert held(it, "a1") == 2
    it.answered(prompt("d1"))
    assert [held(it, word) for word in ("a1", "b1", "c1", "d1")] == [0, 2, 2, 2]
    assert it.match_evicted(prompt("a1x")) == 2 * BYTES


def test_a_growing_conversation_takes_one_place():
    it = shadow("a", "b", "abc", "abcde", "x")
    assert (it.room, held(it, "abcdef"), held(it, "b")) == (0, 5, 1)
    it.answered(prompt("abcdefg"))
    assert held(it, "b") == 1


def test_the_same_prompt_again_is_the_newest():
    it = shadow("a1", "b1", "c1", "a1", "d1")
    assert [held(it, word) for word in ("a1", "b1")] == [2, 0]


def test_a_system_prompt_is_kept_as_soon_as_it_is_read():
    it = Shadow(1)
    it.prefilled(prompt("ab"))
    assert held(it, "ax") == 1
    it.answered(prompt("ab"))
    assert (held(it, "ab"), it.room) == (2, 0)
    it.prefilled(prompt("b1"))
    assert (held(it, "ab"), held(it, "b1")) == (0, 1)


def test_a_system_prompt_that_is_held_is_not_kept_again():
    it = shadow("ab", "ac", "b1")
    it.prefilled(prompt("ad"))
    assert [held(it, word) for word in ("ab", "ac", "b1")] == [2, 2, 2]


def test_what_the_server_had_to_read_is_not_believed_any_more():
    it = shadow("abcd", "abxy")
    it.forget(prompt("abcde"), 1 * BYTES)
    assert [held(it, word) for word in ("abcde", "a")] == [1, 1]
    assert it.room == 2
    assert held(it, "abxy") == 4  # all of another sequence may still be there


def test_an_emptied_cache_holds_nothing_and_has_evicted_nothing():
    it = shadow("a", "b", "c", "d")
    it.clear()
    assert (it.held(), it.room, it.match_evicted(prompt("a"))) == ([], 3, 0)


def test_a_server_without_a_cache_holds_nothing():
    it = shadow("abc", sequences=0)
    it.prefilled(prompt("abc"))
    assert (it.held(), held(it, "abc"), it.match_evicted(prompt("abc"))) == ([], 0, 0)


def test_requests_of_older_routers_hold_nothing():
    it = shadow("ab")
    it.prefilled(PromptPrefixes())
    it.answered(PromptPrefixes())
    assert (it.room, it.match(PromptPrefixes()), it.continues(PromptPrefixes())) == (2, 0, False)


def test_it_remembers_what_was_evicted_last():
    it = shadow(*(f"{number}x" for number in range(1000, 1020)), sequences=2)
    remembered = [word for word in range(1000, 1020) if it.match_evicted(prompt(f"{word}x"))]
    assert remembered
    evicted = [f"{word}x" for word in range(1000, 1018)][-EVICTED * 2 :]
    assert {word for word in evicted if it.match_evicted(prompt(word)) == 5 * BYTES} == set(evicted)
    assert it.match_evicted(prompt("1011x")) < 5 * BYTES


def test_it_tells_the_newest_first_and_what_finds_them_again():
    it = Shadow(3)
    it.answered(prompt("abcdefgh", "session"))
    it.answered(prompt("abcxyz123"))
    told = it.held()
    assert told == [
        *("a", "abcxyz1", "abcxyz12", "abcxyz123", "abc"),
        *("session", "abcdef", "abcdefg", "abcdefgh"),
    ]
    assert it.held() is told  # nothing has changed


def test_it_tells_no_more_than_a_digest_takes():
    it = shadow(*(f"{number}abcdefg" for number in range(1000, 2000)), sequences=1_000)
    assert len(it.held()) == MOST_HELD
    assert "1999abcdefg" in it.held()


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(["answered", "prefilled", "forget", "clear"]), WORDS, st.integers(0, 6))),
    WORDS,
)
def test_whatever_happens_it_holds_beginnings_of_at_most_so_many_prompts(sequences, happened, word):
    it = Shadow(sequences)
    for what, about, above in happened:
        if what == "clear":
            it.clear()
        elif what == "forget":
            it.forget(prompt(about), above * BYTES)
            assert it.match(prompt(about)) <= above * BYTES
        else:
            getattr(it, what)(prompt(about))
            assert held(it, about) >= (sequences and (len(about) if what == "answered" else 1))
    assert 0 <= it.room <= sequences
    assert set(it._ids) == {id_ for kept in it._kept.values() for id_ in kept.ids}
    assert set(it.held()) <= set(it._ids)
    assert held(it, word) == max((len(id_) for id_ in it._ids if word.startswith(id_)), default=0)


@pytest.mark.rest
@given(
    st.integers(1, 4), st.lists(st.tuples(st.booleans(), WORDS, st.text("abc", min_size=1, max_size=3)), max_size=30)
)
def test_it_holds_what_mlx_lm_holds(sequences, requests):
    """As in `mlx_lm.server`, each prompt is looked for, its system prompt inserted when it is read, and all of it with
    its answer when that has ended, unless the request is cut. Each ends with a token of its own, as chat templates do.
    """
    cache = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")
    theirs, ours = cache.LRUPromptCache(sequences), Shadow(sequences)
    for is_cut, word, answer in requests:
        _, rest = theirs.fetch_nearest_cache("model", [*prefixed(word), "end"])
        cached = len(word) + 1 - len(rest)
        assert held(ours, word) == cached
        if not cached:
            theirs.insert_cache("model", prefixed(word)[:1], [Layer()], cache_type="assistant" if is_cut else "system")
        ours.prefilled(prompt(word))
        if not is_cut:
            turn = word + answer
            theirs.insert_cache("model", prefixed(turn), [Layer()])
            ours.answered(prompt(turn))


def prefixed(word):
    return [word[:length] for length in range(1, len(word) + 1)]


class Layer:
    """The cache of one layer of a model, which any beginning of can be used."""

    nbytes = 1

    def is_trimmable(self):
        return True

    def trim(self, tokens):
        return tokens
