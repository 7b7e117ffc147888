"""The executor for GPUs: weights and pages in its memory, one copy in and one out per step."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.base import NEXT_TOKEN, SequenceInput
from framesink.runtime.executors.cuda.answers import AnswerReturn, PendingAnswers
from framesink.runtime.executors.cuda.context_tables import ContextTables
from framesink.runtime.executors.cuda.decode import DecodeRunner, StepResult
from framesink.runtime.executors.cuda.gpu_clock import GpuClock
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS
from framesink.runtime.executors.cuda.language_model import LanguageModel
from framesink.runtime.executors.cuda.layers import Layers
from framesink.runtime.executors.cuda.operations import Operations
from framesink.runtime.executors.cuda.paged_cache import PagedCache, page_bytes
from framesink.runtime.executors.cuda.prefill import PrefillRunner
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.executors.cuda.token_choice import PreparedChoices, TokenChooser
from framesink.runtime.executors.cuda.vision_part import VisionPart
from framesink.runtime.executors.cuda.weight_source import BundleWeights, WeightSource
from framesink.runtime.executors.cuda.weights import load_language_model
from framesink.runtime.manifest import Limits
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import Grid, PreprocessConfig

# A shared prefix takes part in a step beside the streams.
PREFIXES = 1
# Integers of one sequence in a step, beside its new tokens' and its tiles'.
_SEQUENCE_INTEGERS = 128
_TOKEN_INTEGERS = 8
_WORDS_PER_BASE = 8
# Free memory that is left to activations.
_HEADROOM_BYTES = 2 << 30


class CudaExecutor:
    """Runs both parts on one GPU. See `framesink.runtime.executors.base.Executor`.

    Keys are stored rotated by their places. They and values are in the compute type, or codes, as
    the model's quantization says.
    """

    name = "cuda"

    def __init__(
        self,
        config: ModelConfig,
        preprocess: PreprocessConfig,
        weights: WeightSource,
        limits: Limits,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        vision_dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
    ) -> None:
        """`dtype` is the language model's compute type, `vision_dtype` the vision encoder's;
        `operations` are the kernels.

        Raises CapacityError if weights or pages do not fit into the GPU's memory.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self._device = device
        self._clock = GpuClock() if device.type == "cuda" else None
        layers = Layers(operations, dtype)
        with torch.no_grad():
            self._vision = VisionPart(
                config.vision,
                preprocess,
                weights,
                dtype=vision_dtype,
                device=device,
                operations=operations,
                clock=self._clock,
            )
            model_weights = load_language_model(weights, config.text, dtype)
            scheme = weights.quantization.cache
            self._check_memory(num_pages * page_bytes(config.text, page_size, dtype, scheme))
            positions = 2 * limits.max_context
            self._rotary = RotaryTable.make(
                config.text.head_dim,
                config.text.rope_theta,
                config.text.mrope_section,
                positions,
                device,
            )
            model = LanguageModel(
                config.text,
                model_weights,
                layers,
                self._rotary,
                PagedCache(
                    config.text,
                    weights,
                    model_weights.layers,
                    num_pages=num_pages,
                    page_size=page_size,
                    dtype=dtype,
                    device=device,
                ),
            )
            largest = limits.max_streams + PREFIXES
            # Every base has a tile that is not full, and every reply moved to `previous text`
            # has its own base: room for replies of a few words.
            tiles = -(-limits.max_context // TILE_ROWS) + limits.max_context // _WORDS_PER_BASE
            self._tables = ContextTables(largest, tiles, page_size, device)
            self._staging = Staging(
                largest * (_SEQUENCE_INTEGERS + tiles * (1 + TILE_ROWS))
                + _TOKEN_INTEGERS * max(limits.max_prefill, largest),
                device,
            )
            self._chooser = TokenChooser(
                config.text.vocab_size, self._tables.padding_row + 1, operations, device
            )
            self._decode = DecodeRunner(
                model, self._tables, self._staging, self._chooser, operations, largest, device
            )
            self._answers = AnswerReturn(largest, config.text.vocab_size, device)
            self._prefill = PrefillRunner(
                model,
                self._tables,
                self._staging,
                self._chooser,
                self._decode,
                config.video_token_id,
                sequences=largest,
                tokens=limits.max_prefill,
                context=limits.max_context,
                page_size=page_size,
                device=device,
            )
            if device.type == "cuda":
                self._decode.capture()
                self._prefill.capture()
                torch.cuda.empty_cache()
                torch.cuda.synchronize(device)

    @classmethod
    def from_bundle(cls, bundle: Bundle, *, num_pages: int) -> Self:
        """Load a bundle's weights onto the first GPU, in the compute type it was built for.

        Raises BundleError for weights that do not fit the manifest and for pages the kernels do not
        know, CapacityError as the constructor does.
        """
        from framesink.runtime.executors.cuda import kernel_operations

        manifest = bundle.manifest
        device = torch.device("cuda", 0)
        return cls(
            manifest.model,
            manifest.preprocess,
            BundleWeights(bundle, device),
            manifest.limits,
            num_pages=num_pages,
            page_size=manifest.page_size,
            dtype=getattr(torch, manifest.language_model.compiled.compute_type),
            vision_dtype=getattr(torch, manifest.vision_encoder.compiled.compute_type),
            device=device,
            operations=kernel_operations,
        )

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Tensor:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings `[t·h·w / merge², hidden]`, which stay
        on the GPU, in the compute type."""
        return self._vision.encode_vision(patches, grid)

    def hold_frames(self, frames: UInt8Array) -> Tensor:
        """See `FrameEncoder.hold_frames`."""
        return self._vision.hold_frames(frames)

    def encode_frames(self, chunks: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """See `FrameEncoder.encode_frames`; the embeddings are as those of `encode_vision`."""
        return self._vision.encode_frames(chunks, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Run one in-flight batch: see `Executor.step`."""
        with_logits = [place for place, given in enumerate(batch) if given.needs_logits]
        answers = self._answers.wait(self._launch(batch, with_logits=with_logits))
        return [None if isinstance(answer, int) else answer for answer in answers]

    def step_and_choose(self, batch: Sequence[SequenceInput]) -> list[Float32Array | int | None]:
        """Run one in-flight batch: see `ChoosingExecutor.step_and_choose`."""
        return self.collect(self.launch(batch))

    def launch(self, batch: Sequence[SequenceInput]) -> PendingAnswers:
        """Launch one in-flight batch: see `LaunchingExecutor.launch`."""
        chooser = self._chooser
        host = [place for place, given in enumerate(batch) if not chooser.serves(given.choice)]
        return self._launch(
            batch, with_logits=[place for place in host if batch[place].needs_logits]
        )

    def collect(self, launched: object) -> list[Float32Array | int | None]:
        """Wait for a launched batch: see `LaunchingExecutor.collect`."""
        if not isinstance(launched, PendingAnswers):
            raise TypeError("this is no step that the cuda executor has launched")
        return self._answers.wait(launched)

    def gpu_seconds(self) -> dict[str, float]:
        """See `TimedExecutor.gpu_seconds`; empty on the CPU."""
        return {} if self._clock is None else self._clock.seconds()

    def close(self) -> None:
        """Free weights and pages."""
        del self._decode, self._prefill, self._vision, self._tables, self._staging
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _launch(self, batch: Sequence[SequenceInput], *, with_logits: list[int]) -> PendingAnswers:
        """Launch a step, and the way back of its answers: logits for the sequences at the places
        `with_logits`, tokens for others."""
        with torch.no_grad():
            places, result = self._run(batch)
            return self._answers.send(batch, places, result, with_logits)

    def _run(self, batch: Sequence[SequenceInput]) -> tuple[list[int], StepResult | None]:
        """Launch a step. Prompt parts are packed, with steps of one new token before them. Returns
        the result, and the places of the sequences in it."""
        for given in batch:
            self._check_reach(given)
            if NEXT_TOKEN in given.token_ids and not self._tables.knows(given.context):
                raise ValueError("no token was chosen before in this context")
        self._tables.take_rows(
            [given.context for given in batch if _is_decode(given) or given.needs_logits]
        )
        self._staging.clear()
        decoding = [place for place, given in enumerate(batch) if _is_decode(given)]
        parts = [place for place, given in enumerate(batch) if not _is_decode(given)]
        decodes = [batch[place] for place in decoding]
        pending = self._decode.fill(decodes)
        prepared = self._prefill.prepare(decodes, [batch[place] for place in parts])
        places = decoding + [place for place in parts if batch[place].needs_logits]
        choices = self._prepare_choices(batch, places)
        self._staging.send()
        for tiles in pending:
            self._tables.store(tiles)
        if choices is not None:
            self._chooser.mark(choices)
        if prepared is None:
            with self._measure("decode"):
                result = self._decode.run(len(decoding))
        else:
            self._vision.join(prepared.embeddings)
            with self._measure("mixed" if decodes else "prefill"):
                result = self._prefill.run(prepared)
        if choices is not None:
            self._chooser.replace(choices, result.logits, result.tokens)
        return places, result

    def _prepare_choices(
        self, batch: Sequence[SequenceInput], places: Sequence[int]
    ) -> PreparedChoices | None:
        members = [batch[place] for place in places]
        rows = [self._tables.row_of(given.context) for given in members]
        return self._chooser.prepare(members, rows, self._staging)

    def _measure(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.measure(name)

    def _check_reach(self, given: SequenceInput) -> None:
        """Raise CapacityError for positions or places beyond the rotary tables. A base is the
        difference of two that were in them."""
        if given.bases is None:
            raise ValueError("the cuda executor needs the bases of new tokens")
        last = int(given.positions.max())
        reach = max(last, last - int(given.bases.min()))
        if reach >= len(self._rotary.cos):
            raise CapacityError(
                f"A session has reached position {reach}, and the bundle was built for "
                f"{len(self._rotary.cos)}; use a smaller policy, or a larger max_context."
            )

    def _check_memory(self, needed: int) -> None:
        """Raise CapacityError unless `needed` bytes of pages fit beside what the GPU holds."""
        if self._device.type != "cuda":
            return
        free = torch.cuda.mem_get_info(self._device)[0] - _HEADROOM_BYTES
        if needed > free:
            raise CapacityError(
                f"{self.num_pages} pages need {needed / 1e9:.1f} GB of GPU memory and "
                f"{max(0, free) / 1e9:.1f} GB are free beside the weights, room for "
                f"{max(0, self.num_pages * free // needed)} pages; ask for fewer sessions or a "
                "shorter context."
            )


def _is_decode(given: SequenceInput) -> bool:
    return given.token_ids.size == 1 and given.vision_embeddings is None
