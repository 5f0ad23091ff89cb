"""Which prompts are refused because they surely do not fit, and that no other one is."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker import ContextLengthExceeded
from fleet_worker.router.context_length import PIECE, _loaded, at_least, counted, require_fits
from tests.mlx_clients import took_less_than
from tests.unit.registry.test_view import about_instance, about_model, say
from tests.unit.router.test_attempts import request
from tests.unit.router.test_router import Fleet, accepted, response

tokenizers = pytest.importorskip("tokenizers", reason="it comes with mlx-lm")
WINDOW = 4096


def asking(*messages):
    return request(
        "chat", messages=[{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]
    )


def refusal(*messages, window=WINDOW):
    try:
        require_fits(asking(*messages), window)
    except ContextLengthExceeded as error:
        return error
    return None


def is_refused(*messages, window=WINDOW):
    return refusal(*messages, window=window) is not None


def test_a_refusal_names_the_field_and_the_limit_and_quotes_nothing():
    error = refusal("word " * (2 * WINDOW))
    assert (error.param, error.metadata["context_window"], error.retryable) == ("messages", WINDOW, False)
    assert (
        error.message == "messages: they have more than 4096 tokens, which is all that the model can read: shorten them"
    )


TEXTS = {
    "as many bytes as tokens": ("x" * WINDOW, False),
    "words that most tokenizers would not fit in": ("word " * (WINDOW + 10), False),
    "words that no tokenizer fits in": ("word " * (2 * WINDOW), True),
    "short words": ("a " * (2 * WINDOW), True),
    "one long word": ("x" * (15 * WINDOW), False),
    "one very long word": ("xy" * (9 * WINDOW), True),
    "lines of dashes": (("-" * 128 + "\n") * 1000, False),
    "text without spaces": ("字" * (10 * WINDOW), False),
    "white space": (" \n\t" * (100 * WINDOW), False),
    "a table of white space": ((" " * 500 + "|") * (WINDOW // 2), False),
}


@pytest.mark.parametrize(("text", "refused"), TEXTS.values(), ids=TEXTS)
def test_what_no_tokenizer_fits_in_is_refused(text, refused):
    assert is_refused(text) == refused
    assert not is_refused(text, window=None)


def test_all_messages_count_and_only_what_is_rendered():
    half = "word " * WINDOW
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200 * WINDOW}}
    assert is_refused(half, {"role": "assistant", "content": half})
    assert is_refused({"role": "system", "content": [{"type": "text", "text": half}] * 2})
    assert not is_refused({"role": "user", "content": [{"type": "text", "text": half}, image]})
    assert not is_refused("Hi", {"role": "assistant", "content": f"<think>{half * 9}</think>Hello"}, "Bye")
    assert not is_refused("Hi", {"role": "assistant", "content": None, "tool_calls": []}, "Bye")
    require_fits(request("embed", input=[half * 9]), WINDOW)


def test_a_text_of_megabytes_takes_little_memory_and_time():
    text = "a word " * 300_000
    asked = asking(text)
    with took_less_than(2), pytest.raises(ContextLengthExceeded):
        require_fits(asked, WINDOW)
    tracemalloc.start()
    try:
        at_least([text])
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_text_that_is_cut_into_pieces_has_no_more_words():
    words = "word " * (3 * PIECE // 5)
    assert at_least([words]) <= len(words.split()) / 1.33


# --- With the tokenizer of the model


TRAINED_ON = [
    "the quick brown fox jumps over the lazy dog",
    "    ",
    "=" * 64,
    "aaaaaaaaaaaaaaaa",
    "12345 67890",
    "字字字 é",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Of the kind that most models have."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TRAINED_ON * 10, trainer)
    return made


@given(
    st.lists(st.sampled_from([*TRAINED_ON, " ", "\n", "x", "word", "=", "字"]), max_size=30).map("".join) | st.text()
)
def test_a_tokenizer_makes_no_fewer_tokens_than_the_least(tokenizer, text):
    assert at_least([text]) <= len(tokenizer.encode(text).ids)


@pytest.fixture
def model(tokenizer, tmp_path, monkeypatch):
    """A model in the cache of this machine."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    _loaded.cache_clear()
    folder = tmp_path / "models--m"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc", "utf-8")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    tokenizer.enable_truncation(max_length=5)
    tokenizer.enable_padding(length=50 * WINDOW)
    tokenizer.save(str(folder / "snapshots" / "abc" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    yield folder / "snapshots" / "abc" / "tokenizer.json"
    _loaded.cache_clear()


def test_texts_are_counted_by_the_tokenizer_of_their_model(model, tokenizer):
    texts = ["the quick brown fox " * 20, "字", ""]
    assert counted("m", texts) == sum(len(tokenizer.encode(text).ids) for text in texts)
    assert counted("another", texts) is None


def test_tokens_are_counted_where_the_model_is_on_this_machine(model, tokenizer):
    text = "the quick brown fox " * 1100
    tokens = len(tokenizer.encode(text).ids)
    assert at_least([text]) < tokens - 10
    assert is_refused(text, window=tokens - 10)
    assert not is_refused(text, window=tokens)
    assert not is_refused("x" * (WINDOW - 1))
    assert is_refused(text, text, window=tokens + 10)


@pytest.mark.parametrize("broken", ["", "{}", "[" * 10_000])
def test_a_tokenizer_that_cannot_be_read_refuses_nothing(model, broken):
    model.write_text(broken, "utf-8")
    assert not is_refused("word " * (WINDOW + 10))


def test_without_the_package_nothing_is_counted(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert not is_refused("the quick brown fox " * 1100, window=4400)


# --- In a router


@pytest.mark.parametrize("windows", [(4096, 2048), (4096, None), (None, None), ("4096",), ()])
def test_the_largest_window_of_all_that_may_answer_counts_if_all_are_known(windows):
    with Fleet() as fleet:
        for number, window in enumerate(windows):
            instance, limits = f"i{number}", {"context_window": window} if window else {}
            say(fleet.router._registry, about_instance(instance), about_model(instance=instance, limits=limits))
        fleet.answers = [[accepted(), response()]] * 3
        long = [{"role": "user", "content": "word " * 8000}]
        if windows == (4096, 2048):
            with pytest.raises(ContextLengthExceeded, match="more than 4096 tokens"):
                fleet.router.chat("m", long)
            assert fleet.requests == []
            long[0]["content"] = "word " * 4000
        fleet.router.chat("m", long)
        assert len(fleet.requests) == 1
