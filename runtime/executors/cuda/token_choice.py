"""Tokens chosen on the GPU: one number a sequence travels back, not its logits.

Every step takes the likeliest tokens. For sequences that choose otherwise, their tokens are then
replaced, by work that is launched for no others.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.executors.base import NEXT_TOKEN, SequenceInput
from framesink.runtime.executors.cuda.kernels.step_tokens import NOT_FINITE, Choosing
from framesink.runtime.executors.cuda.operations import Operations
from framesink.runtime.executors.cuda.sampling import draw, penalised
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.sampler import SamplingParams, SeenTokens, TokenChoice


@dataclass(frozen=True, slots=True, eq=False)
class PreparedChoices:
    """The sequences of a step that choose otherwise, n of them; tensors hold their numbers once
    staging is sent.

    `places` int32 `[n]` are their rows of the step's result, `rows` int32 `[n]` those of their
    contexts. `numbers` int32 `[5, n, 2]` are float64 numbers: temperature, top-k, top-p, penalty
    and the random one. `seen` are tokens int32 to be marked as seen, by the context's row; contexts
    of `fresh` have none marked yet. `fed` are contexts whose last token has become one of them.
    """

    params: tuple[SamplingParams, ...]
    places: Tensor
    rows: Tensor
    numbers: Tensor
    fresh: tuple[int, ...]
    seen: tuple[tuple[int, Tensor], ...]
    fed: tuple[int, ...]


class TokenChooser:
    """Chooses among all tokens but the suppressed ones, which the first step decides on."""

    def __init__(
        self, vocabulary: int, contexts: int, operations: Operations, device: torch.device
    ) -> None:
        """For the sequences of up to `contexts` contexts."""
        self._operations = operations
        self._choosing = Choosing.make(vocabulary, contexts, device)
        self._suppressed: frozenset[int] | None = None
        self._seen = torch.zeros((contexts, vocabulary), dtype=torch.bool, device=device)
        # Whose tokens are marked in each context's row of `_seen`, and how many of them.
        self._marked: dict[int, tuple[SeenTokens, int]] = {}
        # Compiles what chooses after a penalty or a temperature, before the first step does.
        self.choose(
            torch.zeros((1, vocabulary), dtype=torch.float32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    @property
    def last_tokens(self) -> Tensor:
        """What was chosen last in each context, int32 `[contexts]`."""
        return self._choosing.last_tokens

    def serves(self, choice: TokenChoice | None) -> bool:
        """Whether tokens are chosen with just these suppressed; the first call says which. None is
        a sequence that chooses for itself."""
        return choice is not None and self._suppresses(choice.suppressed)

    def prepare(
        self, batch: Sequence[SequenceInput], rows: Sequence[int], staging: Staging
    ) -> PreparedChoices | None:
        """Stage what `replace` needs for the sequences of a step's result, whose contexts are
        `rows`; None if all of them take the likeliest token."""
        found = [
            (place, row, given, given.choice)
            for place, (given, row) in enumerate(zip(batch, rows, strict=True))
            if given.choice is not None
            and not given.choice.takes_likeliest
            and given.needs_logits
            and self.serves(given.choice)
        ]
        if not found:
            return None
        fresh, seen, fed = [], [], []
        for _, row, given, choice in found:
            if choice.seen is None:
                continue
            owner, count = self._marked.get(row, (None, 0))
            if owner is not choice.seen:
                fresh.append(row)
                count = 0
            new = choice.seen.after(count)
            if new.size:
                seen.append((row, staging.put(new)))
            if given.token_ids[-1] == NEXT_TOKEN:
                fed.append(row)
            self._marked[row] = (choice.seen, len(choice.seen))
        return PreparedChoices(
            params=tuple(choice.params for *_, choice in found),
            places=staging.put(np.array([place for place, *_ in found], np.int32)),
            rows=staging.put(np.array([row for _, row, *_ in found], np.int32)),
            numbers=staging.put(_numbers([choice for *_, choice in found])),
            fresh=tuple(fresh),
            seen=tuple(seen),
            fed=tuple(fed),
        )

    def mark(self, prepared: PreparedChoices) -> None:
        """Bring the seen tokens up to date: before the step, which changes the last tokens."""
        for row in prepared.fresh:
            self._seen[row].zero_()
        for row, tokens in prepared.seen:
            self._seen[row].index_fill_(0, tokens.long(), True)
        for row in prepared.fed:
            last = self.last_tokens[row : row + 1].clamp(min=0)
            self._seen[row].index_fill_(0, last.long(), True)

    def choose(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Of logits `[B, vocab]` the likeliest tokens, int32 `[B]`, which also become the last ones
        of the contexts `rows` int32 `[B]`; `NOT_FINITE` where the largest is not a number. Can be
        captured in a graph."""
        tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
        self._operations.choose_likeliest(logits, rows, self._choosing, tokens)
        return tokens

    def replace(self, prepared: PreparedChoices, logits: Tensor, tokens: Tensor) -> None:
        """Replace the `tokens` int32 `[B]` of sequences that choose otherwise from their logits
        `[B, vocab]`, and the last ones of their contexts."""
        params, rows = prepared.params, prepared.rows
        temperature, top_k, top_p, penalty, fractions = (
            # Staged integers need not lie where float64 numbers may.
            prepared.numbers.clone().view(torch.float64)[..., 0]
        )
        scores = logits[prepared.places.long()].float()
        if any(given.repetition_penalty != 1.0 for given in params):
            seen = self._seen[rows.long()] & (penalty != 1.0)[:, None]
            scores = penalised(scores, seen, penalty.float()[:, None])
        scores = scores.masked_fill(self._choosing.allowed == 0, -torch.inf)
        drawing = temperature > 0.0
        scores = scores / torch.where(drawing, temperature, 1.0).float()[:, None]
        chosen = self.choose(scores, rows)
        if any(given.temperature > 0.0 for given in params):
            drawn = draw(
                scores,
                top_k.long() if any(given.top_k for given in params) else None,
                top_p if any(given.top_p < 1.0 for given in params) else None,
                fractions,
            )
            chosen = torch.where(drawing & (chosen != NOT_FINITE), drawn, chosen).to(torch.int32)
            self.last_tokens[rows.long()] = chosen
        tokens[prepared.places.long()] = chosen

    def _suppresses(self, suppressed: Collection[int]) -> bool:
        wanted = frozenset(suppressed)
        if self._suppressed is None:
            self._suppressed = wanted
            self._choosing.allowed[sorted(wanted)] = 0
        return wanted == self._suppressed


def _numbers(choices: Sequence[TokenChoice]) -> Int32Array:
    """The numbers of `PreparedChoices`, as integers on the way."""
    numbers = [
        (
            choice.params.temperature,
            choice.params.top_k,
            choice.params.top_p,
            choice.params.repetition_penalty,
            choice.fraction,
        )
        for choice in choices
    ]
    array = np.ascontiguousarray(np.array(numbers, np.float64).T)
    return array.view(np.int32).reshape(len(array), len(choices), 2)
