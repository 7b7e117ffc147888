"""The integers of a step with parts of prompts, laid out for one of a few shapes.

A step is filled up to its shape with tokens that belong to nobody and parts without tokens, so that
what is launched depends on the shape alone and can be captured in a CUDA graph.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.cuda.decode import NO_SLOT
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows, NewRows
from framesink.runtime.executors.cuda.staging import Staging

# Steps with one part, the common ones, are filled up less: between 768 and 896 tokens every row of
# a product costs.
_TOKEN_STEP = 128
_TOKEN_STEP_OF_ONE_PART = 64
_DECODING = (0, 8, 16, 24, 32, 40, 48, 56, 64)
# Fields begin at addresses that kernels need not be compiled anew for.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step's first `decoding` tokens are decode steps of as many sequences, all other of its
    `tokens` belong to `parts` parts of prompts."""

    decoding: int
    tokens: int
    parts: int


class StepShapes:
    """The shapes that steps are filled up to."""

    def __init__(self, sequences: int, tokens: int) -> None:
        """For steps of at most `sequences` sequences, and of parts of at most `tokens` tokens
        together."""
        self._decoding = [*(size for size in _DECODING if size < sequences), sequences]
        self._longest = -(-(sequences + tokens) // _ALIGNMENT) * _ALIGNMENT
        self._tokens_of_one_part = self._up_to_longest(_TOKEN_STEP_OF_ONE_PART)
        self._tokens_of_parts = self._up_to_longest(_TOKEN_STEP)
        powers = (1 << power for power in range(sequences.bit_length()))
        self._parts = [*(size for size in powers if size < sequences), sequences]

    def __iter__(self) -> Iterator[StepShape]:
        """All of them, the largest first."""
        for parts in reversed(self._parts):
            tokens = reversed(self._tokens(parts))
            for size, decoding in product(tokens, reversed(self._decoding)):
                if size > decoding:
                    yield StepShape(decoding, size, parts)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest shape."""
        return self._longest

    def smallest(
        self, decodes: Sequence[SequenceInput], parts: Sequence[SequenceInput]
    ) -> StepShape:
        """The smallest shape with room for a step. Raises CapacityError if there is none."""
        prompt = sum(given.token_ids.size for given in parts)
        decoding = _at_least(self._decoding, len(decodes))
        count = _at_least(self._parts, len(parts))
        tokens = _at_least(self._tokens(count or 1), (decoding or 0) + prompt)
        if decoding is None or tokens is None or count is None:
            raise CapacityError(
                f"A step of {len(decodes) + len(parts)} sequences with {prompt} tokens of prompts "
                f"is larger than the executor was made for, {self._parts[-1]} and "
                f"{self._longest - self._decoding[-1]}; use smaller parts."
            )
        return StepShape(decoding, tokens, count)

    def _tokens(self, parts: int) -> list[int]:
        """The numbers of tokens of steps with so many parts, ascending."""
        return self._tokens_of_one_part if parts == 1 else self._tokens_of_parts

    def _up_to_longest(self, step: int) -> list[int]:
        return [*range(step, self._longest, step), self._longest]


@dataclass(frozen=True, slots=True, eq=False)
class _Field:
    """A region of the staged integers, on the host and on the device."""

    host: Int32Array
    device: Tensor


class PackedStep:
    """A step's integers in a block that holds nothing else.

    `tokens` int32 `[m]` are those of the parts. `rows` are of all tokens, the decode steps' first.
    `starts` int32 `[B + 1]` says where each part begins. `last` int32 `[n]` are the tokens whose
    logits are wanted, counted from the step's first, and `last_contexts` int32 `[n]` the rows of
    their contexts in the tables. `context` are the rows before the parts. `integers` is how much of
    the block it takes.
    """

    def __init__(self, shape: StepShape, staging: Staging, *, answers: int, context: int) -> None:
        """Lay a step out from the beginning of `staging`, with room for `answers` logits and for
        contexts of `context` rows."""
        staging.clear()

        def field(*sizes: int) -> _Field:
            size = math.prod(sizes)
            host, device = staging.take(-(-size // _ALIGNMENT) * _ALIGNMENT)
            return _Field(host[:size].reshape(sizes), device[:size].view(sizes))

        self.shape = shape
        self._tokens = field(shape.tokens - shape.decoding)
        self._positions = field(3, shape.tokens)
        self._bases = field(shape.tokens)
        self._slots = field(shape.tokens)
        self._starts = field(shape.parts + 1)
        self._last = field(min(answers, shape.decoding + shape.parts))
        self._last_contexts = field(self._last.host.size)
        self._counts = field(shape.parts)
        self._context_slots = field(shape.parts, context)
        self._context_bases = field(shape.parts, context)
        self.integers = staging.used
        self.tokens = self._tokens.device
        self.rows = NewRows(self._positions.device, self._bases.device, self._slots.device)
        self.starts = self._starts.device
        self.last = self._last.device
        self.last_contexts = self._last_contexts.device
        self.context = DeviceRows(
            self._context_slots.device, self._context_bases.device, self._counts.device
        )

    def clear(self, padding_row: int) -> None:
        """Make it a step of nobody; `padding_row` of the tables is nobody's, too."""
        for field, nothing in (
            (self._tokens, 0),
            (self._positions, 0),
            (self._bases, 0),
            (self._slots, NO_SLOT),
            (self._starts, 0),
            (self._last, 0),
            (self._last_contexts, padding_row),
            (self._counts, 0),
        ):
            field.host[...] = nothing

    def fill(
        self,
        decodes: Sequence[SequenceInput],
        parts: Sequence[SequenceInput],
        contexts: Sequence[int],
        page_size: int,
    ) -> None:
        """Write a step that is no larger than the shape, after `clear`. `contexts` are the rows of
        the tables of `decodes`, then of the parts that want logits."""
        self._fill_rows(0, decodes)
        self._fill_rows(self.shape.decoding, parts)
        lengths = [given.token_ids.size for given in parts]
        ends = np.cumsum(lengths, dtype=np.int32)
        starts = self._starts.host
        starts[1 : len(parts) + 1] = ends
        starts[len(parts) + 1 :] = ends[-1]
        self._tokens.host[: ends[-1]] = np.concatenate([given.token_ids for given in parts])
        wanted = [index for index, given in enumerate(parts) if given.needs_logits]
        last = self._last.host
        last[: len(decodes)] = np.arange(len(decodes))
        last[len(decodes) : len(contexts)] = self.shape.decoding + ends[wanted] - 1
        self._last_contexts.host[: len(contexts)] = contexts
        for index, given in enumerate(parts):
            slots, bases = context_rows(given.context, page_size)
            self._counts.host[index] = slots.size
            self._context_slots.host[index, : slots.size] = slots
            self._context_bases.host[index, : slots.size] = bases

    def _fill_rows(self, first: int, batch: Sequence[SequenceInput]) -> None:
        """Positions, bases and slots of new tokens, from the step's token `first` on."""
        for given in batch:
            if given.bases is None:
                raise ValueError("a sequence needs the bases of its tokens")
            place = slice(first, first + given.token_ids.size)
            self._positions.host[:, place] = given.positions
            self._bases.host[place] = given.bases
            self._slots.host[place] = given.slots
            first = place.stop


def context_rows(view: ContextView, page_size: int) -> tuple[Int32Array, Int32Array]:
    """Slots and bases of a context's rows, int32 `[n]` each, in the order of its block table."""
    if view.bases is None:
        raise ValueError("a context needs the bases of its rows")
    rows = np.flatnonzero(view.valid)
    slots = view.block_table[rows // page_size] * page_size
    return slots + (rows % page_size).astype(np.int32), view.bases[rows]


def _at_least(sizes: Sequence[int], needed: int) -> int | None:
    """The smallest of ascending sizes that is no smaller than `needed`."""
    place = bisect_left(sizes, needed)
    return sizes[place] if place < len(sizes) else None
