"""The dense reference without any memory of its own: every turn computes its whole window anew."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reference.dense_streaming import DenseStream, TurnRecord


class RecomputedStream(DenseStream):
    """What `DenseStream` retains, sent again with every turn; its keys and values are never kept.

    With a `step` above 1 the window is trimmed once in so many turns, by so many turns at once.
    """

    def __init__(self, *args: Any, step: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step = step
        self.embeddings: list[torch.Tensor] = []

    def chunk(
        self, frames: NDArray[np.uint8] | None, t0: float, t1: float, **options: Any
    ) -> TurnRecord:
        self.dense.select([])
        return super().chunk(frames, t0, t1, **options)

    def _reply(
        self, vision: torch.Tensor | None, record: TurnRecord, said: Sequence[int] | None
    ) -> None:
        if vision is not None:
            self.embeddings.append(vision)
        super()._reply(torch.cat(self.embeddings) if self.embeddings else None, record, said)

    def _evict(self) -> None:
        window = self.policy.reply_turns
        assert window == self.policy.vision_turns
        turns = len(self._user_blocks())
        if turns == window:
            for _ in range(self.step):
                super()._evict()

    def _keep(self, order: Sequence[int]) -> None:
        block_of = self._vision_block_numbers()
        kept = dict.fromkeys(block_of[index] for index in order if index in block_of)
        self.embeddings = [self.embeddings[number] for number in kept]
        super()._keep(order)
