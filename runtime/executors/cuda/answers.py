"""Chosen tokens on their way to the host: pinned memory, one copy and one event a step."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.decode import StepResult
from framesink.runtime.executors.cuda.kernels.step_tokens import NOT_FINITE

# Steps launched and not collected, at most.
STEPS_UNDER_WAY = 2


@dataclass(frozen=True, slots=True, eq=False)
class PendingAnswers:
    """The answers of a step of `count` sequences, on the host once `arrived` is.

    `tokens` int32 `[n]` are those of the sequences at `places`; `logits` float32 `[vocab]` those of
    places that are answered with logits. `unwanted` places get no answer.
    """

    count: int
    places: list[int]
    unwanted: frozenset[int]
    tokens: Tensor
    logits: dict[int, Tensor]
    arrived: torch.cuda.Event | None


class AnswerReturn:
    """Brings answers back, those of two steps at a time."""

    def __init__(self, largest: int, vocabulary: int, device: torch.device) -> None:
        """For steps of at most `largest` sequences."""
        self._on_gpu = device.type == "cuda"
        self._vocabulary = vocabulary
        self._tokens = [self._on_host(largest, torch.int32) for _ in range(STEPS_UNDER_WAY)]
        self._events = [
            torch.cuda.Event() if self._on_gpu else None for _ in range(STEPS_UNDER_WAY)
        ]
        self._next = 0

    def send(
        self,
        batch: Sequence[SequenceInput],
        places: list[int],
        result: StepResult | None,
        with_logits: Collection[int],
    ) -> PendingAnswers:
        """Launch the copies of a step's `result`, whose rows are the sequences at `places`: the
        next step overwrites it. Those at places `with_logits` are answered with logits."""
        host, arrived = self._tokens[self._next], self._events[self._next]
        self._next = (self._next + 1) % STEPS_UNDER_WAY
        tokens = host[: len(places)]
        logits = {}
        if result is not None:
            tokens.copy_(result.tokens, non_blocking=True)
            for row, place in enumerate(places):
                if place in with_logits:
                    logits[place] = self._on_host(self._vocabulary, torch.float32)
                    logits[place].copy_(result.logits[row].float(), non_blocking=True)
        if arrived is not None:
            arrived.record()
        unwanted = frozenset(place for place in places if not batch[place].needs_logits)
        return PendingAnswers(len(batch), places, unwanted, tokens, logits, arrived)

    def wait(self, pending: PendingAnswers) -> list[Float32Array | int | None]:
        """Wait for a step: every sequence's token or logits float32 `[vocab]`, None where neither
        was asked for."""
        if pending.arrived is not None:
            pending.arrived.synchronize()
        answers: list[Float32Array | int | None] = [None] * pending.count
        for place, token in zip(pending.places, pending.tokens.tolist(), strict=True):
            if place in pending.unwanted:
                continue
            if place in pending.logits:
                answers[place] = pending.logits[place].numpy()
            elif token == NOT_FINITE:
                # The logits are gone by now. The session's own sampler refuses these as well.
                answers[place] = np.full(self._vocabulary, np.nan, np.float32)
            else:
                answers[place] = token
        return answers

    def _on_host(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._on_gpu)
