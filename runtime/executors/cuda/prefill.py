"""Parts of prompts, of any number and length, packed one after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.context_tables import ContextTables
from framesink.runtime.executors.cuda.decode import StepResult
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows
from framesink.runtime.executors.cuda.language_model import LanguageModel, NewRows, PackedParts
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.executors.cuda.token_choice import TokenChooser


@dataclass(frozen=True, slots=True, eq=False)
class PreparedParts:
    """What a run needs; every tensor holds its numbers once staging is sent.

    `tokens` int32 `[m]`, `vision_places` int32 `[v]`: those that `embeddings` `[v, hidden]`
    replace. `last` int32 `[n]` are the tokens whose logits are wanted, `last_contexts` int32 `[n]`
    the rows of their contexts in the tables.
    """

    tokens: Tensor
    rows: NewRows
    starts: Tensor
    longest: int
    last: Tensor
    last_contexts: Tensor
    context: DeviceRows
    vision_places: Tensor
    embeddings: tuple[Tensor, ...]


class PrefillRunner:
    """Runs parts of prompts."""

    def __init__(
        self,
        model: LanguageModel,
        tables: ContextTables,
        staging: Staging,
        chooser: TokenChooser,
        vision_token: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        """`vision_token` is the placeholder that vision embeddings replace."""
        self._model = model
        self._tables = tables
        self._staging = staging
        self._chooser = chooser
        self._vision_token = vision_token
        self._page_size = page_size
        self._device = device

    def prepare(self, batch: Sequence[SequenceInput]) -> PreparedParts | None:
        """Stage a step's integers; None for an empty batch."""
        if not batch:
            return None
        put = self._staging.put
        lengths = np.array([given.token_ids.size for given in batch], np.int32)
        starts = np.zeros(len(batch) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        tokens = np.concatenate([given.token_ids for given in batch])
        embeddings = [
            given.vision_embeddings for given in batch if given.vision_embeddings is not None
        ]
        replaced = np.concatenate(
            [
                (given.token_ids == self._vision_token) & (given.vision_embeddings is not None)
                for given in batch
            ]
        )
        wanted = [index for index, given in enumerate(batch) if given.needs_logits]
        return PreparedParts(
            tokens=put(tokens),
            rows=NewRows(
                put(np.concatenate([given.positions for given in batch], axis=1)),
                put(_bases(batch)),
                put(np.concatenate([given.slots for given in batch])),
            ),
            starts=put(starts),
            longest=int(lengths.max()),
            last=put(starts[1:][wanted] - 1),
            last_contexts=put(
                np.array(
                    self._tables.take_rows([batch[index].context for index in wanted]), np.int32
                )
            ),
            context=self._put_contexts(batch),
            vision_places=put(np.flatnonzero(replaced).astype(np.int32)),
            embeddings=tuple(torch.as_tensor(rows, device=self._device) for rows in embeddings),
        )

    def _put_contexts(self, batch: Sequence[SequenceInput]) -> DeviceRows:
        """The rows of every context, in the order of its block table, padded to the longest."""
        found = []
        for given in batch:
            view = given.context
            if view.bases is None:
                raise ValueError("a context needs the bases of its rows")
            rows = np.flatnonzero(view.valid)
            pages = view.block_table[rows // self._page_size]
            found.append((pages * self._page_size + rows % self._page_size, view.bases[rows]))
        counts = np.array([slots.size for slots, _ in found], np.int32)
        longest = max(1, int(counts.max()))
        slots, slots_on_device = self._staging.take(len(batch) * longest)
        bases, bases_on_device = self._staging.take(len(batch) * longest)
        for index, (row_slots, row_bases) in enumerate(found):
            start = index * longest
            slots[start : start + row_slots.size] = row_slots
            bases[start : start + row_bases.size] = row_bases
        shape = (len(batch), longest)
        return DeviceRows(
            slots_on_device.view(shape), bases_on_device.view(shape), self._staging.put(counts)
        )

    def run(self, prepared: PreparedParts) -> StepResult:
        """The results of the parts that want logits, in their order."""
        hidden = self._model.embed(prepared.tokens)
        if prepared.embeddings:
            vision = torch.cat([rows.to(hidden.dtype) for rows in prepared.embeddings])
            hidden[prepared.vision_places.long()] = vision
        logits = self._model.prefill(
            hidden,
            prepared.rows,
            PackedParts(prepared.starts, prepared.longest, prepared.last.long()),
            prepared.context,
        )
        return StepResult(logits, self._chooser.choose(logits, prepared.last_contexts))


def _bases(batch: Sequence[SequenceInput]) -> Int32Array:
    bases = [given.bases for given in batch if given.bases is not None]
    if len(bases) < len(batch):
        raise ValueError("a sequence needs the bases of its tokens")
    return np.concatenate(bases)
