"""Decode steps: one new token of many sequences at once, replayed as a CUDA graph.

A step is captured for a few batch sizes; a batch is filled up to the next of them with sequences
that read and write nothing. All a step needs travels in one block of integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.capture import capture
from framesink.runtime.executors.cuda.context_tables import ContextTables, PendingTiles
from framesink.runtime.executors.cuda.kernels.step_tokens import TileChanges
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS, DeviceTiles, NewRows
from framesink.runtime.executors.cuda.language_model import LanguageModel
from framesink.runtime.executors.cuda.operations import Operations
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.executors.cuda.token_choice import TokenChooser

NO_SLOT = -1


class _Field(IntEnum):
    """What each row of a step's integers holds, a column per sequence."""

    TOKEN = 0
    POSITIONS = 1
    BASE = 4
    SLOT = 5
    ROW = 6
    TILE = 7
    TILE_BASE = 8
    TILES = 9
    TILE_SLOTS = 10
    END = 10 + TILE_ROWS


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """`logits` `[n, vocab]` of the compute type, and the `tokens` chosen from them, int32 `[n]`;
    valid until the next step."""

    logits: Tensor
    tokens: Tensor


def batch_sizes(largest: int) -> list[int]:
    """The batch sizes that are captured: up to 8 a few, then multiples of 8."""
    sizes = [size for size in (1, 2, 4, 8) if size < largest]
    sizes += range(16, largest, 8)
    return [*sizes, largest]


class DecodeRunner:
    """Runs decode steps of up to `largest` sequences."""

    def __init__(
        self,
        model: LanguageModel,
        tables: ContextTables,
        staging: Staging,
        chooser: TokenChooser,
        operations: Operations,
        largest: int,
        device: torch.device,
    ) -> None:
        """Takes its region of `staging`. Nothing is captured yet."""
        self._model = model
        self._tables = tables
        self._staging = staging
        self._chooser = chooser
        self._operations = operations
        self._largest = largest
        self._device = device
        array, tensor = staging.reserve(_Field.END * largest)
        self._array: Int32Array = array.reshape(_Field.END, largest)
        self._inputs = tensor.view(_Field.END, largest)
        self._clear(0)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._results: dict[int, StepResult] = {}

    def capture(self) -> None:
        """Capture every batch size, the largest first: the others share its memory."""
        pool = torch.cuda.graph_pool_handle()
        results: dict[int, StepResult] = {}
        for size in reversed(batch_sizes(self._largest)):
            work = partial(self._forward, size)
            self._graphs[size], results[size] = capture(work, self._device, pool)
        self._results = dict(sorted(results.items()))

    def fill(self, batch: Sequence[SequenceInput]) -> list[PendingTiles]:
        """Write a step's integers; its sequences have their rows of the tables. Returns lists of
        tiles that must be stored before the step."""
        pending: list[PendingTiles] = []
        tables, array = self._tables, self._array
        for column, given in enumerate(batch):
            tracked = tables.track(given.context)
            tile = tables.add_row(tracked, given)
            if not tracked.sent:
                pending.append(tables.send(tracked, self._staging))
            tiles = tracked.tiles
            assert given.bases is not None
            array[: _Field.TILE_SLOTS, column] = (
                given.token_ids[0],
                *given.positions[:, 0],
                given.bases[0],
                given.slots[0],
                tracked.row,
                tile,
                tiles.bases[tile],
                tiles.count,
            )
            array[_Field.TILE_SLOTS :, column] = tiles.slots[tile]
        self._clear(len(batch))
        return pending

    def run(self, count: int) -> StepResult:
        """A step of the first `count` sequences, whose integers must have arrived."""
        if self._device.type != "cuda":
            return self._forward(count)
        size = next(size for size in self._results if size >= count)
        self._graphs[size].replay()
        result = self._results[size]
        return StepResult(result.logits[:count], result.tokens[:count])

    def _clear(self, first: int) -> None:
        """Let the columns from `first` on be sequences that read and write nothing."""
        self._array[:, first:] = 0
        self._array[_Field.SLOT, first:] = NO_SLOT
        self._array[_Field.ROW, first:] = self._tables.padding_row

    def begin(self, hidden: Tensor) -> DeviceTiles:
        """Write the embeddings of the first sequences' tokens into `hidden` `[size, hidden]`, and
        bring their contexts in the tables up to date. Can be captured in a graph."""
        inputs = self._inputs[:, : len(hidden)]
        tiles = self._tables.read(inputs[_Field.ROW])
        self._operations.begin_step(
            inputs[_Field.TOKEN],
            self._chooser.last_tokens,
            self._model.embedding,
            tiles,
            TileChanges(
                inputs[_Field.TILE],
                inputs[_Field.TILE_BASE],
                inputs[_Field.TILE_SLOTS :],
                inputs[_Field.TILES],
            ),
            hidden,
        )
        return tiles

    def _forward(self, size: int) -> StepResult:
        inputs = self._inputs[:, :size]
        embedding = self._model.embedding
        hidden = embedding.new_empty(size, embedding.shape[1])
        tiles = self.begin(hidden)
        positions = inputs[_Field.POSITIONS : _Field.BASE]
        logits = self._model.decode(
            hidden, NewRows(positions, inputs[_Field.BASE], inputs[_Field.SLOT]), tiles
        )
        return StepResult(logits, self._chooser.choose(logits, tiles.rows))
