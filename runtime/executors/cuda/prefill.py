"""Parts of prompts, of any number and length, packed one after another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.context_tables import ContextTables, PendingTiles
from framesink.runtime.executors.cuda.language_model import LanguageModel, NewRows, PackedParts
from framesink.runtime.executors.cuda.staging import Staging


@dataclass(frozen=True, slots=True, eq=False)
class PreparedParts:
    """What a run needs; every tensor holds its numbers once staging is sent.

    `tokens` int32 `[m]`, `tables` int32 `[B]`: rows of the contexts' table, `vision_places` int32
    `[v]`: the tokens that `embeddings` `[v, hidden]` replace.
    """

    tokens: Tensor
    rows: NewRows
    starts: Tensor
    longest: int
    last: Tensor
    tables: Tensor
    vision_places: Tensor
    embeddings: tuple[Tensor, ...]


class PrefillRunner:
    """Runs parts of prompts."""

    def __init__(
        self,
        model: LanguageModel,
        tables: ContextTables,
        staging: Staging,
        vision_token: int,
        device: torch.device,
    ) -> None:
        """`vision_token` is the placeholder that vision embeddings replace."""
        self._model = model
        self._tables = tables
        self._staging = staging
        self._vision_token = vision_token
        self._device = device

    def prepare(
        self, batch: Sequence[SequenceInput], in_use: set[int], pending: list[PendingTiles]
    ) -> PreparedParts | None:
        """Stage a step's integers; None for an empty batch. Context rows taken join `in_use`,
        lists of tiles that must be stored `pending`."""
        if not batch:
            return None
        put = self._staging.put
        lengths = np.array([given.token_ids.size for given in batch], np.int32)
        starts = np.zeros(len(batch) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        tables = []
        for given in batch:
            tracked = self._tables.track(given.context, in_use)
            in_use.add(tracked.row)
            # Sent as it is before the new rows, which the kernel takes from where they come from.
            if not tracked.sent:
                pending.append(self._tables.send(tracked, self._staging))
            self._tables.add_rows(tracked, given)
            tracked.sent = False
            tables.append(tracked.row)
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
            tables=put(np.array(tables, np.int32)),
            vision_places=put(np.flatnonzero(replaced).astype(np.int32)),
            embeddings=tuple(torch.as_tensor(rows, device=self._device) for rows in embeddings),
        )

    def run(self, prepared: PreparedParts) -> Tensor:
        """Logits float32 `[n, vocab]` of the parts that want them, in their order."""
        hidden = self._model.embed(prepared.tokens)
        if prepared.embeddings:
            vision = torch.cat([rows.to(hidden.dtype) for rows in prepared.embeddings])
            hidden[prepared.vision_places.long()] = vision
        return self._model.prefill(
            hidden,
            prepared.rows,
            PackedParts(prepared.starts, prepared.longest, prepared.last.long()),
            self._tables.read(prepared.tables.long()),
        )


def _bases(batch: Sequence[SequenceInput]) -> Int32Array:
    bases = [given.bases for given in batch if given.bases is not None]
    if len(bases) < len(batch):
        raise ValueError("a sequence needs the bases of its tokens")
    return np.concatenate(bases)
