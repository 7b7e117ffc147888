"""From a reply to spans: what is a word, what may be the closing, what is not known yet."""

from framesink.runtime.executors.base import NEXT_TOKEN
from framesink.runtime.kv.positions import text_span
from framesink.runtime.kv.sequence_cache import SequenceCache
from framesink.runtime.kv.span import SpanKind, SpanPart
from framesink.runtime.reply import Reply


class ReplyWriter:
    """Appends one reply to the end of a cache, token by token.

    Words stand in the reply's body. Tokens that may be the closing stand in its close, whose rows
    lie in the frame lane, which empties with the turn; words may live for ever, so those among them
    are taken back and written again, in the text lane.

    A token that is still being chosen can stand in the body as a guess that it will be a word, so
    that its row can be written at once. A guess that was wrong is taken back.
    """

    def __init__(self, cache: SequenceCache, reply: Reply, turn: int) -> None:
        self.reply = reply
        self._cache = cache
        self._turn = turn
        self._guessed = False

    @property
    def may_guess(self) -> bool:
        """Whether the next token can stand in the body, if it is a word."""
        return not self._guessed and not self.reply.held

    def guess(self) -> None:
        """Append a word that nobody knows yet; to be followed by `push` or `take_guess_back`."""
        self._append(SpanPart.BODY, [NEXT_TOKEN], new=self.reply.words == 0)
        self._guessed = True

    def take_guess_back(self) -> bool:
        """Remove the guess and its row, if there is one; whether there was."""
        guessed, self._guessed = self._guessed, False
        if guessed:
            self._cache.take_back_token()
        return guessed

    def push(self, token: int) -> bool:
        """Add the next token, no stop token. Returns False if a guess that it is a word was made
        and taken back."""
        reply = self.reply
        before, held_before = reply.words, len(reply.held)
        reply.push(token)
        if self._guessed and not reply.held:
            self._guessed = False
            self._cache.name_last(token)
            return True
        right = not self.take_guess_back()
        if reply.words == before:  # the held tokens grew by one
            self._append(SpanPart.CLOSE, [token], new=held_before == 0)
            return right
        self._settle(before, held_before)
        if reply.held:
            self._append(SpanPart.CLOSE, reply.held, new=True)
        return right

    def end(self) -> None:
        """No more tokens come: those that were held are the closing, or words."""
        reply = self.reply
        before, held_before = reply.words, len(reply.held)
        reply.end()
        if reply.words > before:
            self._settle(before, held_before)

    def close(self, tokens: list[int]) -> None:
        """Append what closes every reply."""
        self._append(SpanPart.CLOSE, tokens, new=not self.reply.held)

    def _settle(self, before: int, held_before: int) -> None:
        """Append words that have become certain."""
        if held_before:
            self._cache.take_back_last()
        words = self.reply.tokens[before : self.reply.words]
        if words:
            self._append(SpanPart.BODY, words, new=before == 0)

    def _append(self, part: SpanPart, tokens: list[int], *, new: bool) -> None:
        if new:
            self._cache.append(text_span(SpanKind.REPLY, part, self._turn, tokens))
        else:
            self._cache.extend_last(tokens)
