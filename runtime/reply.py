"""One reply while it grows: which of its tokens are words, and which may be its closing.

A reply ends in ` ...`, which is no word of it. Tokens that may turn out to be the closing are held
back until the next token tells.
"""

from collections.abc import Sequence


class Reply:
    """The sampled tokens of one reply, stop token apart.

    `tokens[:words]` are words for certain; the rest is held: the longest end of the reply that
    begins like the closing.
    """

    def __init__(self, closing: Sequence[int]) -> None:
        self._closing = list(closing)
        self.tokens: list[int] = []
        self.words = 0

    @property
    def held(self) -> list[int]:
        """Tokens that may be the closing."""
        return self.tokens[self.words :]

    def push(self, token: int) -> None:
        """Add a sampled token that is not a stop token."""
        self.tokens.append(token)
        longest = min(len(self._closing), len(self.tokens))
        for length in range(longest, 0, -1):
            if self.tokens[-length:] == self._closing[:length]:
                self.words = len(self.tokens) - length
                return
        self.words = len(self.tokens)

    def end(self) -> None:
        """Nothing more comes: what is held is the closing if it is whole, and words if not."""
        if self.held != self._closing:
            self.words = len(self.tokens)
