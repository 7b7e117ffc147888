"""StreamingVLM on a plain list of tokens: no spans, no pages, blocks found by their tokens.

The second implementation the runtime is checked against. Rules and search patterns are those of
mit-han-lab/streaming-vlm (`process_past_kv`, `get_qwen_range`), with its intent where its code
misses it: `recent_text` tokens are kept (not one less), and a reply that was cut short keeps its
last word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from reference.positions import GridSize, mrope_positions

from fake.hashing import attend, embedding_content, logits_of, row_value
from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.protocol import ChatProtocol


@dataclass
class Entry:
    """One retained token. `content` is what the fake model sees, `value` the row it left."""

    token: int
    content: int
    value: int | None = None


@dataclass
class TokenList:
    """A stream's retained tokens. Windows count turns; `grids` are those of its vision blocks.

    `previous_words` were said before the stream began.
    """

    protocol: ChatProtocol
    vision_turns: int
    reply_turns: int
    sink_text: int
    recent_text: int
    query: str | None = None
    previous_words: Sequence[int] = ()
    turn: int = 0
    entries: list[Entry] = field(default_factory=list)
    grids: list[GridSize] = field(default_factory=list)

    def __post_init__(self) -> None:
        protocol = self.protocol
        self._extend(protocol.system)
        if self.query is not None:
            self._extend(protocol.pinned(self.query))
        self._prefix_users = len(self._blocks(protocol.user_open))
        self._extend([*protocol.previous_text_open, *protocol.turn_close])
        if self.previous_words:
            self._say_before(list(self.previous_words))

    @property
    def tokens(self) -> list[int]:
        """Ids of the retained tokens."""
        return [entry.token for entry in self.entries]

    def begin_turn(
        self,
        time_text: tuple[float, float],
        grid: GridSize | None,
        embeddings: Float32Array | None,
        question: str | None = None,
    ) -> None:
        """Evict, then append everything up to the reply's header."""
        if self.turn > 0:
            self._evict()
        self.turn += 1
        protocol = self.protocol
        self._extend([*protocol.user_open, *protocol.time_text(*time_text)])
        if grid is not None and embeddings is not None:
            self.grids.append(grid)
            start, *pads, end = protocol.vision(len(embeddings))
            self._extend([start])
            for pad, embedding in zip(pads, embeddings, strict=True):
                self.entries.append(Entry(pad, embedding_content(embedding)))
            self._extend([end])
        if question is not None:
            self._extend(protocol.question(question))
        self._extend([*protocol.turn_close, *protocol.reply_open])

    def end_reply(self, sampled: Sequence[int]) -> None:
        """Append what a reply of these sampled tokens leaves (for a stream without a model)."""
        kept = list(sampled)
        if kept and kept[-1] in self.protocol.stop_tokens:
            kept.pop()
        self._extend([*kept, *self.protocol.turn_close])

    def reply(self, max_new_tokens: int, tokens_per_second: float = 2.0) -> list[int]:
        """Let the fake model reply; returns the sampled tokens."""
        protocol = self.protocol
        sampled: list[int] = []
        likely = [*protocol.reply_closing, protocol.turn_end, protocol.turn_start]
        while len(sampled) < max_new_tokens:
            digest = self._write(tokens_per_second)
            logits = logits_of(digest, protocol.tokenizer.vocabulary_size, likely)
            logits[sorted(protocol.suppressed_tokens)] = -np.inf
            sampled.append(int(logits.argmax()))
            if sampled[-1] in protocol.stop_tokens:
                break
            self._extend(sampled[-1:])
        self._extend(protocol.turn_close)
        return sampled

    def _write(self, tokens_per_second: float) -> int:
        """Give every token a row; returns the digest of all of them."""
        positions = self.positions(tokens_per_second)
        first = next(i for i, entry in enumerate(self.entries) if entry.value is None)
        assert all(entry.value is None for entry in self.entries[first:])
        values = np.array([entry.value or 0 for entry in self.entries], dtype=np.uint64)
        digest = attend(values[:first], positions[:, :first])
        for index in range(first, len(self.entries)):
            position = positions[:, index : index + 1]
            value = row_value(self.entries[index].content, position, digest)
            self.entries[index].value = value
            digest += attend(np.array([value], dtype=np.uint64), position)
            digest &= 2**64 - 1
        return digest

    def positions(self, tokens_per_second: float = 2.0) -> Int32Array:
        """int32 `[3, n]`: positions of the retained tokens, counted anew."""
        found = mrope_positions(
            self.tokens,
            self.grids,
            video_pad=self.protocol.video_pad,
            merge_size=2,
            time_steps=[tokens_per_second] * len(self.grids),
        )
        return np.array(found, dtype=np.int32).T

    # StreamingVLM's rules.

    def _evict(self) -> None:
        turn, reply_turns, vision_turns = self.turn, self.reply_turns, self.vision_turns
        protocol = self.protocol
        if turn >= reply_turns:
            start, end = self._blocks(protocol.reply_open)[0]
            words = slice(start + len(protocol.reply_open), end - len(protocol.turn_close))
            moved = self.entries[words]
            closing = protocol.reply_closing
            if [entry.token for entry in moved[-len(closing) :]] == closing:
                moved = moved[: -len(closing)]
            del self.entries[start:end]
            if vision_turns > reply_turns:
                # this turn's own user block is not there yet
                start, _ = self._user_blocks()[-reply_turns]
                start += len(protocol.user_open)
                self._delete(start, self.tokens.index(protocol.vision_start, start))
            _, body_end = self._previous_text()
            self.entries[body_end:body_end] = moved
        if turn >= vision_turns and vision_turns < reply_turns:
            start = self.tokens.index(protocol.vision_start)
            self._delete(start, self.tokens.index(protocol.vision_end) + 1)
        if turn >= max(reply_turns, vision_turns):
            self._delete(*self._user_blocks()[0])
        start, end = self._previous_text()
        if end - start > self.sink_text + self.recent_text:
            self._delete(start + self.sink_text, end - self.recent_text)

    def _delete(self, start: int, end: int) -> None:
        if self.protocol.vision_start in self.tokens[start:end]:
            del self.grids[0]
        del self.entries[start:end]

    def _blocks(self, header: list[int]) -> list[tuple[int, int]]:
        """`[start, end)` of the turns that open with `header`, their closing included."""
        tokens, close = self.tokens, self.protocol.turn_close
        starts = [i for i in range(len(tokens)) if tokens[i : i + len(header)] == header]
        return [(start, tokens.index(close[0], start) + len(close)) for start in starts]

    def _user_blocks(self) -> list[tuple[int, int]]:
        return self._blocks(self.protocol.user_open)[self._prefix_users :]

    def _previous_text(self) -> tuple[int, int]:
        ((start, end),) = self._blocks(self.protocol.previous_text_open)
        return start + len(self.protocol.previous_text_open), end - len(self.protocol.turn_close)

    def _say_before(self, words: list[int], tokens_per_second: float = 2.0) -> None:
        """Put words into `previous text` as a stream that said them has them there: the close was
        written when nothing had been said."""
        if len(words) > self.sink_text + self.recent_text:
            words = words[: self.sink_text] + words[len(words) - self.recent_text :]
        self._write(tokens_per_second)
        at = len(self.entries) - len(self.protocol.turn_close)
        close, self.entries = self.entries[at:], self.entries[:at]
        if words:
            self._extend(words)
            self._write(tokens_per_second)
        self.entries += close

    def _extend(self, tokens: Sequence[int]) -> None:
        self.entries.extend(Entry(token, token) for token in tokens)
