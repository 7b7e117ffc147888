"""The likeliest token, chosen on the GPU: one number a sequence travels back, not its logits."""

from collections.abc import Collection

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.step_tokens import Choosing
from framesink.runtime.executors.cuda.operations import Operations


class TokenChooser:
    """Chooses among all tokens but the suppressed ones, which the first step decides on."""

    def __init__(
        self, vocabulary: int, contexts: int, operations: Operations, device: torch.device
    ) -> None:
        """For the sequences of up to `contexts` contexts."""
        self._operations = operations
        self._choosing = Choosing.make(vocabulary, contexts, device)
        self._suppressed: frozenset[int] | None = None

    @property
    def last_tokens(self) -> Tensor:
        """What was chosen last in each context, int32 `[contexts]`."""
        return self._choosing.last_tokens

    def serves(self, suppressed: Collection[int] | None) -> bool:
        """Whether tokens are chosen with just these suppressed; the first call says which. None is
        a sequence that chooses for itself."""
        if suppressed is None:
            return False
        wanted = frozenset(suppressed)
        if self._suppressed is None:
            self._suppressed = wanted
            self._choosing.allowed[sorted(wanted)] = 0
        return wanted == self._suppressed

    def choose(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Of logits `[B, vocab]` the likeliest tokens, int32 `[B]`, which also become the last ones
        of the contexts `rows` int32 `[B]`; `NOT_FINITE` where the largest is not a number. Can be
        captured in a graph."""
        tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        self._operations.choose_likeliest(logits, rows, self._choosing, tokens)
        return tokens
