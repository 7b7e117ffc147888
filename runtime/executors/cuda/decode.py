"""Decode steps: one new token of many sequences at once, replayed as a CUDA graph.

A step is captured for a few batch sizes; a batch is filled up to the next of them with sequences
that read and write nothing. All a step needs travels in one block of integers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.context_tables import ContextTables, PendingTiles
from framesink.runtime.executors.cuda.language_model import LanguageModel, NewRows
from framesink.runtime.executors.cuda.staging import Staging

NO_SLOT = -1
_TOKEN, _POSITIONS, _BASE, _SLOT, _ROW, _TILE, _TILE_BASE, _COUNT, _ENTRIES = (
    0,
    1,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
)
_WARM_UPS = 2


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
        largest: int,
        device: torch.device,
    ) -> None:
        """Takes its region of `staging`. Nothing is captured yet."""
        self._model = model
        self._tables = tables
        self._staging = staging
        self._largest = largest
        self._device = device
        fields = _ENTRIES + 2 * tables.entries
        array, tensor = staging.reserve(fields * largest)
        self._array: Int32Array = array.reshape(fields, largest)
        self._inputs = tensor.view(fields, largest)
        self._clear(0)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}

    def capture(self) -> None:
        """Capture every batch size, the largest first: the others share its memory."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(batch_sizes(self._largest)):
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._forward(size)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._logits[size] = self._forward(size)
            self._graphs[size] = graph

    def fill(
        self, batch: Sequence[SequenceInput], in_use: set[int], pending: list[PendingTiles]
    ) -> None:
        """Write a step's integers. Context rows taken join `in_use`, lists of tiles that must be
        stored before the step `pending`."""
        tables, array = self._tables, self._array
        middle = _ENTRIES + tables.entries
        for column, given in enumerate(batch):
            tracked = tables.track(given.context, in_use)
            in_use.add(tracked.row)
            tile = tables.add_rows(tracked, given)
            if not tracked.sent:
                pending.append(tables.send(tracked, self._staging))
            tiles = tracked.tiles
            assert given.bases is not None
            array[:_ENTRIES, column] = (
                given.token_ids[0],
                *given.positions[:, 0],
                given.bases[0],
                given.slots[0],
                tracked.row,
                tile,
                tiles.bases[tile],
                tiles.count,
            )
            array[_ENTRIES:middle, column] = tiles.pages[tile]
            array[middle:, column] = tiles.masks[tile]
        self._clear(len(batch))

    def run(self, count: int) -> Tensor:
        """A step of the first `count` sequences, whose integers must have arrived: logits float32
        `[count, vocab]`, overwritten by the next step."""
        if self._device.type != "cuda":
            return self._forward(count)
        size = next(size for size in batch_sizes(self._largest) if size >= count)
        self._graphs[size].replay()
        return self._logits[size][:count]

    def _clear(self, first: int) -> None:
        """Let the columns from `first` on be sequences that read and write nothing."""
        self._array[:, first:] = 0
        self._array[_SLOT, first:] = NO_SLOT
        self._array[_ROW, first:] = self._tables.padding_row

    def _forward(self, size: int) -> Tensor:
        inputs, entries = self._inputs[:, :size], self._tables.entries
        rows = inputs[_ROW].long()
        self._tables.patch(
            rows,
            inputs[_TILE].long(),
            inputs[_TILE_BASE],
            inputs[_ENTRIES : _ENTRIES + entries].T,
            inputs[_ENTRIES + entries :].T,
            inputs[_COUNT],
        )
        return self._model.decode(
            inputs[_TOKEN],
            NewRows(inputs[_POSITIONS : _POSITIONS + 3], inputs[_BASE], inputs[_SLOT]),
            self._tables.read(rows),
        )
