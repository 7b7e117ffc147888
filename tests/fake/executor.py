"""An executor without a model that checks everything it is given.

Its K/V rows are hashes, its attention is a sum of hashes: its answers depend on every retained
token, on the position of each, and on all that each saw when it was written.
"""

from collections.abc import Sequence

import numpy as np

from fake.hashing import attend, embedding_content, logits_of, row_value
from framesink.runtime.arrays import BoolArray, Float32Array, Int32Array
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.preprocess import Grid
from framesink.runtime.protocol import ChatProtocol

HIDDEN = 4


class FakeExecutor:
    """Raises AssertionError for a step no correct runtime would ask for."""

    name = "fake"

    def __init__(self, protocol: ChatProtocol, *, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.closed = False
        self.batch_sizes: list[int] = []
        self._vocabulary = protocol.tokenizer.vocabulary_size
        self._pad = protocol.video_pad
        self._likely = [*protocol.reply_closing, protocol.turn_end, protocol.turn_start]
        rows = num_pages * page_size
        self._values = np.zeros(rows, dtype=np.uint64)
        self._places = np.zeros((3, rows), dtype=np.int32)
        self._written: BoolArray = np.zeros(rows, dtype=np.bool_)

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """Embeddings that depend on the patches of each merged token."""
        assert patches.shape[0] == grid.patches
        groups = patches.reshape(grid.tokens(2), -1)
        return np.ascontiguousarray(groups[:, :HIDDEN])

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Check, then answer."""
        assert batch
        self.batch_sizes.append(len(batch))
        new_slots = np.concatenate([given.slots for given in batch])
        assert len(set(new_slots.tolist())) == new_slots.size, "two tokens share a slot"
        assert (new_slots >= self.page_size).all(), "a row would be written to the null page"
        contexts = [self._context_slots(given.context) for given in batch]
        for slots in contexts:
            assert not np.isin(new_slots, slots).any(), "a row that is read would be overwritten"
        return [self._run(given, slots) for given, slots in zip(batch, contexts, strict=True)]

    def close(self) -> None:
        """Remember that it was called."""
        self.closed = True

    def _context_slots(self, context: ContextView) -> Int32Array:
        """Slots of the valid rows; they were written, by tokens of the place claimed now."""
        table, valid = context.block_table, context.valid
        size = table.size * self.page_size
        assert table.dtype == np.int32
        assert table.size >= 1
        assert context.bases is not None
        assert context.positions.shape == (3, size)
        assert valid.shape == context.bases.shape == (size,)
        assert len(set(table.tolist())) == table.size, "a page is listed twice"
        rows = np.arange(self.page_size, dtype=np.int32)
        slots = (table[:, None] * np.int32(self.page_size) + rows).reshape(-1)
        assert not valid[slots < self.page_size].any(), "the null page holds no rows"
        assert self._written[slots[valid]].all(), "a row that was never written would be read"
        places = context.positions[:, valid] - context.bases[valid]
        assert np.array_equal(places, self._places[:, slots[valid]]), "a row moved in its span"
        assert not context.positions[:, ~valid].any(), "an invalid slot has a position"
        return slots[valid]

    def _run(self, given: SequenceInput, slots: Int32Array) -> Float32Array | None:
        count = given.token_ids.size
        assert count >= 1
        assert given.bases is not None
        assert given.positions.shape == (3, count)
        assert given.slots.shape == given.bases.shape == (count,)
        read = given.context.positions[:, given.context.valid]
        everyone = np.concatenate([read, given.positions], axis=1)
        assert len(set(map(tuple, everyone.T.tolist()))) == everyone.shape[1], "a position twice"
        contents = given.token_ids.astype(object)
        pads = np.flatnonzero(given.token_ids == self._pad)
        embeddings = given.vision_embeddings
        assert (0 if embeddings is None else len(embeddings)) == pads.size
        for index, pad in enumerate(pads):
            assert embeddings is not None
            contents[pad] = embedding_content(embeddings[index])

        digest = attend(self._values[slots], read)
        for index, slot in enumerate(given.slots.tolist()):
            position = given.positions[:, index : index + 1]
            value = row_value(int(contents[index]), position, digest)
            self._values[slot] = value
            self._places[:, slot] = position[:, 0] - given.bases[index]
            self._written[slot] = True
            digest += attend(self._values[slot : slot + 1], position)
            digest &= 2**64 - 1
        if not given.needs_logits:
            return None
        return logits_of(digest, self._vocabulary, self._likely)
