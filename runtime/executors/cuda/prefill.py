"""Parts of prompts, of any number and length, packed one after another.

Sequences that decode in the same step go before them: all read the weights together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.context_tables import ContextTables
from framesink.runtime.executors.cuda.decode import DecodeRunner, StepResult
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows, NewRows
from framesink.runtime.executors.cuda.language_model import LanguageModel, PackedParts
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.executors.cuda.token_choice import TokenChooser


@dataclass(frozen=True, slots=True, eq=False)
class PreparedParts:
    """What a run needs; every tensor holds its numbers once staging is sent.

    The step's first `decoding` tokens are decode steps; `tokens` int32 `[m]` are those of the parts
    after them. All else is about both: `vision_places` int32 `[v]` are the tokens that `embeddings`
    `[v, hidden]` replace, `last` int32 `[n]` those whose logits are wanted, `last_contexts` int32
    `[n]` the rows of their contexts in the tables.
    """

    decoding: int
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
        decode: DecodeRunner,
        vision_token: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        """`vision_token` is the placeholder that vision embeddings replace."""
        self._model = model
        self._tables = tables
        self._staging = staging
        self._chooser = chooser
        self._decode = decode
        self._vision_token = vision_token
        self._page_size = page_size
        self._device = device

    def prepare(
        self, decodes: Sequence[SequenceInput], parts: Sequence[SequenceInput]
    ) -> PreparedParts | None:
        """Stage a step's integers; None without parts. `decodes` are the sequences whose decode
        step the `DecodeRunner` was filled with."""
        if not parts:
            return None
        put = self._staging.put
        everyone = [*decodes, *parts]
        lengths = np.array([given.token_ids.size for given in parts], np.int32)
        starts = np.zeros(len(parts) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        replaced = np.concatenate(
            [
                (given.token_ids == self._vision_token) & (given.vision_embeddings is not None)
                for given in parts
            ]
        )
        wanted = [index for index, given in enumerate(parts) if given.needs_logits]
        single = np.arange(len(decodes), dtype=np.int32)
        asked = [*decodes, *(parts[index] for index in wanted)]
        contexts = self._tables.take_rows([given.context for given in asked])
        return PreparedParts(
            decoding=len(decodes),
            tokens=put(np.concatenate([given.token_ids for given in parts])),
            rows=NewRows(
                put(np.concatenate([given.positions for given in everyone], axis=1)),
                put(_bases(everyone)),
                put(np.concatenate([given.slots for given in everyone])),
            ),
            starts=put(starts),
            longest=int(lengths.max()),
            last=put(np.concatenate([single, len(decodes) + starts[1:][wanted] - 1])),
            last_contexts=put(np.array(contexts, np.int32)),
            context=self._put_contexts(parts),
            vision_places=put(len(decodes) + np.flatnonzero(replaced).astype(np.int32)),
            embeddings=tuple(
                torch.as_tensor(given.vision_embeddings, device=self._device)
                for given in parts
                if given.vision_embeddings is not None
            ),
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
        """The results of the decode steps, then of the parts that want logits, in their order."""
        single, embedding = prepared.decoding, self._model.embedding
        hidden = embedding.new_empty(single + len(prepared.tokens), embedding.shape[1])
        tiles = self._decode.begin(hidden[:single]) if single else None
        torch.index_select(embedding, 0, prepared.tokens, out=hidden[single:])
        if prepared.embeddings:
            vision = torch.cat([rows.to(hidden.dtype) for rows in prepared.embeddings])
            hidden[prepared.vision_places.long()] = vision
        logits = self._model.prefill(
            hidden,
            prepared.rows,
            PackedParts(prepared.starts, prepared.longest, prepared.last.long()),
            prepared.context,
            tiles,
        )
        return StepResult(logits, self._chooser.choose(logits, prepared.last_contexts))


def _bases(batch: Sequence[SequenceInput]) -> Int32Array:
    bases = [given.bases for given in batch if given.bases is not None]
    if len(bases) < len(batch):
        raise ValueError("a sequence needs the bases of its tokens")
    return np.concatenate(bases)
