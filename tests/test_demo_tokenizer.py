"""The demo's tokenizer: Qwen's layout, and phrases whose tokens do not depend on what surrounds."""

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo import phrases
from demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from demo.turns import TurnEncoder
from demo.world import make_scene
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

MODEL = Path(__file__).parents[1] / "demo" / "model"
TOKENIZER = Tokenizer.from_directory(MODEL)


def test_the_bundled_tokenizer_is_what_training_one_gives() -> None:
    trained = train_tokenizer().to_str(pretty=True)
    assert trained == (MODEL / "tokenizer.json").read_text(encoding="utf-8")


def test_special_tokens_end_the_vocabulary() -> None:
    ids = [TOKENIZER.special(content) for content, _ in SPECIAL_TOKENS]
    assert ids == list(range(TOKENIZER.vocabulary_size - len(ids), TOKENIZER.vocabulary_size))


def test_words_of_the_world_and_the_closing_are_single_tokens() -> None:
    words = {
        *(*phrases.COLOURS, *phrases.SHAPES, *phrases.PLACES, *phrases.NUMBERS),
        *(*phrases.ORDINALS, "enters", "leaves", "turns", "bounces", "..."),
    }
    assert {word: len(TOKENIZER.encode(f" {word}")) for word in words} == dict.fromkeys(words, 1)


def test_digits_are_single_tokens() -> None:
    assert len(TOKENIZER.encode("1209")) == 4


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode_plain(text)) == _normalised(text)


def _normalised(text: str) -> str:
    from unicodedata import normalize

    return normalize("NFC", text)


def test_replies_keep_their_tokens_when_they_are_joined() -> None:
    """Replies move into `previous text` token by token; re-encoding the text must give the same."""
    replies = [truth.reply for truth in make_scene(5, 90).truth if truth.reply]
    one_by_one = [token for reply in replies for token in TOKENIZER.encode(reply)]
    assert one_by_one == TOKENIZER.encode("".join(replies))
    closed = [*TOKENIZER.encode(replies[0]), *TOKENIZER.encode(" ...")]
    assert closed == TOKENIZER.encode(f"{replies[0]} ...")


def test_everything_the_world_says_fits_its_slots() -> None:
    encoder = TurnEncoder(ChatProtocol(TOKENIZER))
    longest = {
        *(phrases.turns(*three) for three in product(phrases.COLOURS, phrases.SHAPES, ("red",))),
        *(phrases.enters(20, *two) for two in product(phrases.COLOURS, phrases.SHAPES)),
    }
    assert max(len(encoder.encode(text)) for text in longest) <= 6
    for question in (*phrases.ask_where("purple", "triangle"), *phrases.ask_entered("red", "star")):
        encoder.prompt(9998.0, question, first=False)
    for query in (*phrases.QUERIES, None):
        encoder.prefix(query)
    with pytest.raises(ValueError, match="do not fit"):
        encoder.prompt(0.0, "How many shapes of any colour are there in this picture?", first=True)
