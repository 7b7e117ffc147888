"""The streaming detokenizer against decoding everything at once."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.tiny_tokenizer import train_tokenizer
from tokenizers import AddedToken

from framesink.runtime.detokenizer import Detokenizer
from framesink.runtime.tokenizer import Tokenizer


@cache
def tokenizer(vocabulary: int) -> Tokenizer:
    backend = train_tokenizer(vocabulary)
    backend.add_tokens([AddedToken("<tool_call>"), AddedToken("日本")])
    return Tokenizer(backend)


vocabularies = st.sampled_from([270, 300, 460])


@given(text=st.text(max_size=60), vocabulary=vocabularies, step=st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_text_comes_whole_however_it_is_split(text: str, vocabulary: int, step: int) -> None:
    """What comes piece by piece is what decoding at once gives, and no piece is ever broken."""
    backend = tokenizer(vocabulary)
    ids = backend.encode_plain(text)
    detokenizer = Detokenizer(backend)
    pieces = [detokenizer.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    whole = backend.decode(ids)
    assert "".join(pieces) == whole
    assert detokenizer.finish() == ""
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 475), max_size=40), vocabulary=vocabularies)
@settings(max_examples=300, deadline=None)
def test_any_tokens_decode_as_at_once(ids: list[int], vocabulary: int) -> None:
    """Special, added and unknown tokens and bytes that are no UTF-8 among them."""
    backend = tokenizer(vocabulary)
    detokenizer = Detokenizer(backend)
    pieces = [detokenizer.push([token]) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == backend.decode(ids)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    backend = tokenizer(270)
    ids = backend.encode("é…🎥")
    assert len(ids) == 9
    detokenizer = Detokenizer(backend)
    pieces = [detokenizer.push([token]) for token in ids]
    assert pieces == ["", "é", "", "", "…", "", "", "", "🎥"]


def test_a_character_that_never_becomes_whole_is_marked_once() -> None:
    backend = tokenizer(270)
    detokenizer = Detokenizer(backend)
    assert detokenizer.push(backend.encode("a🎥")[:-1]) == "a"
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.push(backend.encode("b")) == "b"


@pytest.mark.parametrize("content", ["<|im_end|>", "<|video_pad|>"])
def test_special_tokens_are_no_text(content: str) -> None:
    backend = tokenizer(460)
    assert Detokenizer(backend).push([backend.special(content)]) == ""
