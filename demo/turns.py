"""The chat format of a scene as fixed slots, so that many videos can be stepped together.

Every turn of every video takes the same `SLOTS` slots; a slot that a turn does not need is empty
(-1). Empty slots have no position, are never attended to, and so change nothing.
"""

from functools import lru_cache

import numpy as np

from demo import phrases
from demo.forward import VISION_TOKENS
from demo.scene import ChunkTruth, EventName, Scene
from framesink.runtime.arrays import AnyArray
from framesink.runtime.protocol import ChatProtocol

EMPTY = -1
_MAX_WORDS = 6
_LENGTHS = {
    "tail": 2,  # the close of the turn before: its rows are computed with this turn
    "open": 3,
    "time": 18,
    "vision": VISION_TOKENS + 2,
    "question": 8,
    "close": 2,
    "reply_open": 3,
    "words": _MAX_WORDS,
    "closing": 1,
}
_ENDS = np.cumsum(list(_LENGTHS.values())).tolist()
PART = {
    name: slice(end - length, end)
    for (name, length), end in zip(_LENGTHS.items(), _ENDS, strict=True)
}
SLOTS: int = _ENDS[-1]
# The slots whose logits make the reply: the last of the prompt, the words, the closing.
REPLY_SLOTS = slice(PART["reply_open"].stop - 1, PART["closing"].stop)
REPLY_LENGTH = _MAX_WORDS + 2

OPENING_SLOTS = 30  # system, pinned query, opening of `previous text`
PREFIX_SLOTS = OPENING_SLOTS + 2  # and its close

# Weights of the loss. Silence is most of what there is to say, counts are hardest to say.
_WEIGHT_WORD, _WEIGHT_ORDINAL, _WEIGHT_ANSWER = 1.0, 2.0, 1.5
_WEIGHT_SILENCE, _WEIGHT_CLOSING, _WEIGHT_END = 1.0, 0.3, 0.1


class TurnEncoder:
    """Turns scenes into slots. Pieces of text are tokenised apart, as the runtime does it."""

    def __init__(self, protocol: ChatProtocol) -> None:
        self.protocol = protocol
        self.encode = lru_cache(maxsize=100_000)(
            lambda text: tuple(protocol.tokenizer.encode(text))
        )
        (self.closing,) = protocol.reply_closing

    def prefix(self, query: str | None) -> AnyArray:
        """Ids int16 `[PREFIX_SLOTS]` of a session's first rows, with an empty previous text."""
        protocol = self.protocol
        pinned = protocol.pinned(query) if query is not None else []
        ids = np.full(PREFIX_SLOTS, EMPTY, np.int16)
        opening = protocol.system + pinned + protocol.previous_text_open
        _fill(ids, slice(0, OPENING_SLOTS), opening)
        _fill(ids, slice(OPENING_SLOTS, PREFIX_SLOTS), protocol.turn_close)
        return ids

    def prompt(self, second: float, question: str | None, *, first: bool) -> AnyArray:
        """Ids int16 `[SLOTS]` of a turn whose reply is not known yet."""
        protocol = self.protocol
        ids = np.full(SLOTS, EMPTY, np.int16)
        if not first:
            _fill(ids, PART["tail"], protocol.turn_close)
        _fill(ids, PART["open"], protocol.user_open)
        _fill(ids, PART["time"], list(self.encode(f"Time={second:.1f}-{second + 1:.1f}s")))
        _fill(ids, PART["vision"], protocol.vision(VISION_TOKENS))
        if question is not None:
            _fill(ids, PART["question"], list(self.encode(question)))
        _fill(ids, PART["close"], protocol.turn_close)
        _fill(ids, PART["reply_open"], protocol.reply_open)
        return ids

    def turn(self, truth: ChunkTruth, second: float, *, first: bool) -> AnyArray:
        """Ids int16 `[SLOTS]` of a turn with the right reply."""
        question = truth.question.text if truth.question is not None else None
        ids = self.prompt(second, question, first=first)
        _fill(ids, PART["words"], list(self.encode(truth.reply)) if truth.reply else [])
        _fill(ids, PART["closing"], [self.closing])
        return ids

    def targets(self, ids: AnyArray) -> AnyArray:
        """The token that follows each reply slot, int16 `[REPLY_LENGTH]`; empty where none does."""
        targets = np.full(REPLY_LENGTH, EMPTY, np.int16)
        words = [token for token in ids[PART["words"]].tolist() if token != EMPTY]
        targets[: len(words) + 1] = [*words, self.closing]
        targets[-1] = self.protocol.turn_end
        return targets

    def loss_weights(self, truth: ChunkTruth) -> AnyArray:
        """How much each reply slot counts in the loss, float32 `[REPLY_LENGTH]`."""
        weights = np.zeros(REPLY_LENGTH, np.float32)
        weights[-1] = _WEIGHT_END
        if not truth.reply:
            weights[0] = _WEIGHT_SILENCE
            return weights
        count = len(self.encode(truth.reply))
        weights[:count] = _WEIGHT_WORD if truth.question is None else _WEIGHT_ANSWER
        if truth.event is not None and truth.event.name is EventName.ENTERS:
            weights[0] = _WEIGHT_ORDINAL
        weights[count] = _WEIGHT_CLOSING
        return weights

    def scene(self, scene: Scene, start: float) -> tuple[AnyArray, AnyArray, AnyArray]:
        """Ids `[chunks, SLOTS]`, targets and loss weights `[chunks, REPLY_LENGTH]` of a scene."""
        ids = [
            self.turn(truth, start + index, first=index == 0)
            for index, truth in enumerate(scene.truth)
        ]
        targets = [self.targets(turn) for turn in ids]
        weights = [self.loss_weights(truth) for truth in scene.truth]
        return np.stack(ids), np.stack(targets), np.stack(weights)


def random_query(random: np.random.Generator) -> str | None:
    """One of the standing queries, or none."""
    pick = int(random.integers(len(phrases.QUERIES) + 2))
    return phrases.QUERIES[pick] if pick < len(phrases.QUERIES) else None


def _fill(ids: AnyArray, part: slice, tokens: list[int]) -> None:
    if len(tokens) > part.stop - part.start:
        raise ValueError(f"{len(tokens)} tokens do not fit into the {part} slots of a turn.")
    ids[part.start : part.start + len(tokens)] = tokens
