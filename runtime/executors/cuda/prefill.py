"""Parts of prompts, of any number and length, packed one after another.

Sequences that decode in the same step go before them: all read the weights together. Steps are
filled up to a few shapes, of which the common ones are replayed as CUDA graphs: launching hundreds
of kernels takes the host milliseconds, more while other threads want the interpreter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.capture import capture
from framesink.runtime.executors.cuda.context_tables import ContextTables
from framesink.runtime.executors.cuda.decode import DecodeRunner, StepResult
from framesink.runtime.executors.cuda.language_model import LanguageModel, PackedParts
from framesink.runtime.executors.cuda.packed_step import PackedStep, StepShape, StepShapes
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.executors.cuda.token_choice import TokenChooser

# Steps of more parts are launched kernel by kernel.
_CAPTURED_PARTS = 2
# Integers of a step beside its contexts, for each token and each sequence.
_TOKEN_INTEGERS = 8
_SEQUENCE_INTEGERS = 64


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStep:
    """A step of `shape` with `answers` answers. The tokens `vision_places` int32 `[v]`, counted
    from the first of the parts, are replaced by `embeddings` `[v, hidden]`."""

    shape: StepShape
    answers: int
    vision_places: Tensor
    embeddings: tuple[Tensor, ...]


class PrefillRunner:
    """Runs steps with parts of prompts."""

    def __init__(
        self,
        model: LanguageModel,
        tables: ContextTables,
        staging: Staging,
        chooser: TokenChooser,
        decode: DecodeRunner,
        vision_token: int,
        *,
        sequences: int,
        tokens: int,
        context: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        """For steps of at most `sequences` sequences, parts of at most `tokens` tokens together and
        contexts of at most `context` rows. `vision_token` is the placeholder that vision embeddings
        replace."""
        self._model = model
        self._tables = tables
        self._staging = staging
        self._chooser = chooser
        self._decode = decode
        self._vision_token = vision_token
        self._sequences = sequences
        self._context = context
        self._page_size = page_size
        self._device = device
        self._shapes = StepShapes(sequences, tokens)
        longest = self._shapes.most_tokens
        self._block = Staging(
            sequences * (2 * context + _SEQUENCE_INTEGERS) + _TOKEN_INTEGERS * longest, device
        )
        self._packed: dict[StepShape, PackedStep] = {}
        self._hidden = model.embedding.new_zeros(longest, model.embedding.shape[1])
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._results: dict[StepShape, StepResult] = {}

    def capture(self) -> None:
        """Capture the common shapes, the largest first: the others share its memory. All are laid
        out, and the largest of those that are not captured is run, so that torch's pool has its
        memory: a process does not grow when it meets a rare shape."""
        pool = torch.cuda.graph_pool_handle()
        for number, shape in enumerate(self._shapes):
            packed = self._packed_step(shape)
            captured = shape.parts <= _CAPTURED_PARTS
            if number > 0 and not captured:
                continue
            packed.clear(self._tables.padding_row)
            self._block.send(packed.integers)
            work = partial(self._forward, packed)
            if captured:
                self._graphs[shape], self._results[shape] = capture(
                    work, self._device, pool, warm_ups=1
                )
            else:
                work()

    def prepare(
        self, decodes: Sequence[SequenceInput], parts: Sequence[SequenceInput]
    ) -> PreparedStep | None:
        """Stage a step's integers; None without parts. `decodes` are the sequences whose decode
        step the `DecodeRunner` was filled with."""
        if not parts:
            return None
        shape = self._shapes.smallest(decodes, parts)
        wanted = [*decodes, *(given for given in parts if given.needs_logits)]
        contexts = self._tables.take_rows([given.context for given in wanted])
        packed = self._packed_step(shape)
        packed.clear(self._tables.padding_row)
        packed.fill(decodes, parts, contexts, self._page_size)
        replaced = np.concatenate(
            [
                (given.token_ids == self._vision_token) & (given.vision_embeddings is not None)
                for given in parts
            ]
        )
        return PreparedStep(
            shape=shape,
            answers=len(contexts),
            vision_places=self._staging.put(np.flatnonzero(replaced).astype(np.int32)),
            embeddings=tuple(
                torch.as_tensor(given.vision_embeddings, device=self._device)
                for given in parts
                if given.vision_embeddings is not None
            ),
        )

    def run(self, prepared: PreparedStep) -> StepResult:
        """The results of the decode steps, then of the parts that want logits, in their order.
        `Staging` must be sent."""
        shape = prepared.shape
        packed = self._packed[shape]
        self._block.send(packed.integers)
        prompt = self._hidden[shape.decoding : shape.tokens]
        torch.index_select(self._model.embedding, 0, packed.tokens, out=prompt)
        if prepared.embeddings:
            vision = torch.cat([rows.to(prompt.dtype) for rows in prepared.embeddings])
            prompt[prepared.vision_places.long()] = vision
        if shape in self._graphs:
            self._graphs[shape].replay()
            result = self._results[shape]
        else:
            result = self._forward(packed)
        return StepResult(result.logits[: prepared.answers], result.tokens[: prepared.answers])

    def _packed_step(self, shape: StepShape) -> PackedStep:
        """The step of a shape, in the block that all shapes share. Waits until what was written
        there last has been copied."""
        self._block.clear()
        if shape not in self._packed:
            self._packed[shape] = PackedStep(
                shape, self._block, answers=self._sequences, context=self._context
            )
        return self._packed[shape]

    def _forward(self, packed: PackedStep) -> StepResult:
        shape = packed.shape
        hidden = self._hidden[: shape.tokens]
        tiles = self._decode.begin(hidden[: shape.decoding]) if shape.decoding else None
        logits = self._model.prefill(
            hidden,
            packed.rows,
            PackedParts(packed.starts, shape.tokens - shape.decoding, packed.last.long()),
            packed.context,
            tiles,
        )
        return StepResult(logits, self._chooser.choose(logits, packed.last_contexts))
