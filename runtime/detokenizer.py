"""Token ids to text, token by token, never a broken character."""

import codecs
from collections.abc import Iterable

from framesink.runtime.tokenizer import Tokenizer


class Detokenizer:
    """Turns a growing list of token ids into text.

    The tokens of a byte-level vocabulary are pieces of UTF-8; bytes are held back until a character
    is whole. The cost of a token does not depend on how many came before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(token) for token in ids))

    def finish(self) -> str:
        """What was held back, broken bytes as U+FFFD; the next token begins a new text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
