"""The executor over TensorRT plans: weights inside them, pages and activations in torch's memory.

It does what the onnxruntime executor does, over the same graphs: pages are gathered inside the
graph, and new rows come out of it and are written into the pages here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.batching import NULL_PAGE, PaddedGroup, group_by_size, pad_group
from framesink.runtime.executors.embedding import find_embedding
from framesink.runtime.executors.tensorrt.contract import load_api
from framesink.runtime.executors.tensorrt.interface import check_plan
from framesink.runtime.executors.tensorrt.language_model import LanguageModelPlan
from framesink.runtime.executors.tensorrt.page_rows import row_places
from framesink.runtime.executors.tensorrt.plan import TORCH_TYPES, Plan
from framesink.runtime.executors.tensorrt.shapes import filled_batch, filled_pages
from framesink.runtime.executors.tensorrt.step_inputs import StepInputs
from framesink.runtime.executors.tensorrt.support import FittingPlans, find_plans
from framesink.runtime.executors.tensorrt.vision_encoder import VisionEncoderPlan
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import Grid

GPU = torch.device("cuda", 0)


class TensorRTExecutor:
    """Runs both plans on one GPU. See `framesink.runtime.executors.base.Executor`."""

    name = "tensorrt"

    def __init__(
        self,
        config: ModelConfig,
        *,
        language_model: Plan,
        vision_encoder: Plan,
        embedding: AnyArray,
        num_pages: int,
        page_size: int,
    ) -> None:
        """`embedding` is the token embedding `[vocab, hidden]` of any float type, on the host.

        Raises CapacityError if the pages are too many for the plan or the GPU's memory.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self._config = config
        self._embedding = embedding
        self._device = language_model.device
        self._dtype = TORCH_TYPES[language_model.spec.compute_type]
        # Both plans run in one stream, one after the other, so they share the memory they work in.
        scratch = max(1, language_model.scratch_bytes, vision_encoder.scratch_bytes)
        memory = torch.empty(scratch, dtype=torch.uint8, device=self._device)
        for plan in (language_model, vision_encoder):
            plan.use_scratch(memory)
        # TensorRT synchronizes the whole device when it runs in the default stream.
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        with self._in_stream():
            self._language_model = LanguageModelPlan(language_model, num_pages)
            self._vision = VisionEncoderPlan(vision_encoder, config.vision)
            self._inputs = StepInputs(config.text, self._dtype, self._device)
        self._filler = _filler()

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, plans: FittingPlans | None = None, *, num_pages: int
    ) -> Self:
        """Load the plans of a bundle that fit this machine, found by `find_plans` if not given.

        Raises BundleError if there are none, or they are not what the manifest says, CapacityError
        as the constructor does.
        """
        manifest = bundle.manifest
        plans = plans or find_plans(bundle)
        specs = {"language_model": plans.language_model, "vision_encoder": plans.vision_encoder}
        check_plan(manifest, "language_model", plans.language_model)
        check_plan(manifest, "vision_encoder", plans.vision_encoder)
        loaded = {
            part: Plan(load_api(spec.builder), bundle.path(spec.path), spec, GPU)
            for part, spec in specs.items()
        }
        return cls(
            manifest.model,
            language_model=loaded["language_model"],
            vision_encoder=loaded["vision_encoder"],
            embedding=find_embedding(bundle),
            num_pages=num_pages,
            page_size=manifest.page_size,
        )

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Tensor:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings `[t·h·w / merge², hidden]`, which stay
        on the GPU, in the compute type."""
        with torch.no_grad(), self._in_stream():
            return self._vision.encode(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Run one in-flight batch, in groups of like size; see `Executor.step`."""
        results: list[Float32Array | None] = [None] * len(batch)
        with torch.no_grad(), self._in_stream():
            launched: list[tuple[tuple[int, ...], Tensor]] = []
            for members in self._groups(batch):
                sequences = [batch[place] for place in members]
                logits = self._run(sequences)
                wanted = [row for row, given in enumerate(sequences) if given.needs_logits]
                # Logits of a decode step lie where the next writes its own.
                launched.append((members, logits[wanted].to(torch.float32, copy=True)))
            for members, logits in launched:
                places = [place for place in members if batch[place].needs_logits]
                for place, row in zip(places, logits.cpu().numpy(), strict=True):
                    results[place] = row
        return results

    def close(self) -> None:
        """Free weights and pages."""
        self._language_model.close()
        self._vision.close()
        if self._stream is not None:
            torch.cuda.empty_cache()

    def _groups(self, batch: Sequence[SequenceInput]) -> list[tuple[int, ...]]:
        """Groups of like size, none of more sequences than the plan takes."""
        most = self._language_model.max_batch
        return [
            members[first : first + most]
            for members in group_by_size(batch, self.page_size)
            for first in range(0, len(members), most)
        ]

    def _run(self, sequences: list[SequenceInput]) -> Tensor:
        """Launch a group. Returns logits `[B, vocab]`, B at least the sequences."""
        model = self._language_model
        pages = max(len(given.context.block_table) for given in sequences)
        if all(len(given.token_ids) == 1 for given in sequences):
            missing = filled_batch(len(sequences), model.max_batch) - len(sequences)
            sequences = [*sequences, *[self._filler] * missing]
        members = tuple(range(len(sequences)))
        filled = filled_pages(pages, model.max_pages)
        group = pad_group(sequences, members, self.page_size, pages=filled)
        inputs = {"inputs_embeds": self._embed(group, sequences), **self._inputs.make(group)}
        return model.run(inputs, row_places(group, self.page_size).to(self._device))

    def _embed(self, group: PaddedGroup, sequences: Sequence[SequenceInput]) -> Tensor:
        """Embeddings `[B, s, hidden]` of the new tokens, vision embeddings in their places."""
        count, new = group.new_positions.shape[1:]
        rows = np.zeros((count, new, self._config.text.hidden_size), np.float32)
        for row, sequence in enumerate(sequences):
            rows[row, : len(sequence.token_ids)] = self._embedding[sequence.token_ids]
        embeds = torch.from_numpy(rows).to(self._device, self._dtype)
        for row, sequence in enumerate(sequences):
            if sequence.vision_embeddings is not None:
                places = np.flatnonzero(sequence.token_ids == self._config.video_token_id)
                vision = torch.as_tensor(sequence.vision_embeddings)
                embeds[row, torch.from_numpy(places).to(self._device)] = vision.to(
                    self._device, self._dtype
                )
        return embeds

    def _in_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _filler() -> SequenceInput:
    """A sequence that fills up a batch: it sees itself alone, and its row goes to the null page."""
    nothing = np.zeros(1, np.int32)
    return SequenceInput(
        token_ids=nothing,
        vision_embeddings=None,
        positions=np.zeros((3, 1), np.int32),
        slots=np.full(1, NULL_PAGE, np.int32),
        context=ContextView(
            block_table=np.full(1, NULL_PAGE, np.int32),
            positions=np.zeros((3, 1), np.int32),
            valid=np.zeros(1, np.bool_),
        ),
        needs_logits=False,
    )
