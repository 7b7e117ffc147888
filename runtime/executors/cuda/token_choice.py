"""The likeliest token, chosen on the GPU: one number a sequence travels back, not its logits."""

from collections.abc import Collection

import torch
from torch import Tensor

NOT_FINITE = -1


class TokenChooser:
    """Chooses among all tokens but the suppressed ones, which the first step decides on."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._offsets = torch.zeros(vocabulary, dtype=torch.float32, device=device)
        self._suppressed: frozenset[int] | None = None

    def serves(self, suppressed: Collection[int] | None) -> bool:
        """Whether tokens are chosen with just these suppressed; the first call says which. None is
        a sequence that chooses for itself."""
        if suppressed is None:
            return False
        wanted = frozenset(suppressed)
        if self._suppressed is None:
            self._suppressed = wanted
            self._offsets[sorted(wanted)] = -torch.inf
        return wanted == self._suppressed

    def choose(self, logits: Tensor) -> Tensor:
        """Of logits float32 `[B, vocab]` the likeliest tokens, int32 `[B]`; `NOT_FINITE` where the
        largest is not a number. Can be captured in a graph."""
        best, tokens = (logits + self._offsets).max(dim=1)
        return torch.where(best.isfinite(), tokens, NOT_FINITE).to(torch.int32)
