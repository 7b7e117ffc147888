"""The executor for GPUs: weights and pages in its memory, one copy in and one out per step."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from framesink.runtime.arrays import Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.cuda.context_tables import ContextTables, PendingTiles
from framesink.runtime.executors.cuda.decode import DecodeRunner
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.language_model import LanguageModel
from framesink.runtime.executors.cuda.layers import Layers
from framesink.runtime.executors.cuda.operations import Operations
from framesink.runtime.executors.cuda.prefill import PrefillRunner
from framesink.runtime.executors.cuda.staging import Staging
from framesink.runtime.executors.cuda.token_choice import NOT_FINITE, TokenChooser
from framesink.runtime.executors.cuda.vision_encoder import VisionEncoder
from framesink.runtime.executors.cuda.weight_source import BundleWeights, WeightSource
from framesink.runtime.executors.cuda.weights import (
    load_language_model,
    load_vision_encoder,
    page_bytes,
)
from framesink.runtime.manifest import Limits
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import Grid

# A shared prefix takes part in a step beside the streams.
PREFIXES = 1
# Integers of one sequence in a step, beside its new tokens' and its tiles'.
_SEQUENCE_INTEGERS = 64
_TOKEN_INTEGERS = 8
# Free memory that is left to activations.
_HEADROOM_BYTES = 2 << 30


class CudaExecutor:
    """Runs both parts on one GPU. See `framesink.runtime.executors.base.Executor`.

    Keys are stored rotated by their places, with their bias, and values as they are, both in the
    compute type.
    """

    name = "cuda"

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        limits: Limits,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
    ) -> None:
        """`dtype` is the compute type and that of the pages; `operations` are the kernels.

        Raises CapacityError if weights or pages do not fit into the GPU's memory.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self._config = config
        self._dtype = dtype
        self._device = device
        layers = Layers(operations, dtype)
        with torch.no_grad():
            self._vision = VisionEncoder(
                config.vision, load_vision_encoder(weights, config.vision, dtype), layers, device
            )
            model_weights = load_language_model(weights, config.text, dtype)
            self._check_memory(num_pages * page_bytes(config, page_size, dtype))
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
                num_pages=num_pages,
                page_size=page_size,
            )
            largest = limits.max_streams + PREFIXES
            # A page lies in a tile for each base among its rows.
            tiles = 2 * -(-limits.max_context // page_size)
            self._tables = ContextTables(largest, tiles, page_size, positions, device)
            self._staging = Staging(
                largest * (_SEQUENCE_INTEGERS + tiles * (1 + 2 * self._tables.entries))
                + _TOKEN_INTEGERS * max(limits.max_prefill, largest),
                device,
            )
            self._chooser = TokenChooser(config.text.vocab_size, device)
            self._decode = DecodeRunner(model, self._tables, self._staging, largest, device)
            self._prefill = PrefillRunner(
                model, self._tables, self._staging, config.video_token_id, device
            )
            if device.type == "cuda":
                self._decode.capture()

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
            BundleWeights(bundle, device),
            manifest.limits,
            num_pages=num_pages,
            page_size=manifest.page_size,
            dtype=getattr(torch, manifest.language_model.compiled.compute_type),
            device=device,
            operations=kernel_operations,
        )

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Tensor:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings `[t·h·w / merge², hidden]`, which stay
        on the GPU, in the compute type."""
        with torch.no_grad():
            moved = torch.from_numpy(patches).to(self._device, self._dtype)
            return self._vision.encode(moved, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Run one in-flight batch: see `Executor.step`."""
        with torch.no_grad():
            wanted, logits = self._run(batch)
            answers: list[Float32Array | None] = [None] * len(batch)
            for place, row in zip(wanted, logits, strict=True):
                if batch[place].needs_logits:
                    answers[place] = _to_host(row)
        return answers

    def step_and_choose(self, batch: Sequence[SequenceInput]) -> list[Float32Array | int | None]:
        """Run one in-flight batch: see `ChoosingExecutor.step_and_choose`."""
        chooses = [self._chooser.serves(given.suppressed) for given in batch]
        answers: list[Float32Array | int | None] = [None] * len(batch)
        with torch.no_grad():
            wanted, logits = self._run(batch)
            if not any(batch[place].needs_logits for place in wanted):
                return answers
            tokens = self._chooser.choose(logits).tolist()
            for place, row, token in zip(wanted, logits, tokens, strict=True):
                if not batch[place].needs_logits:
                    continue
                # Logits that are not finite go to the session's own sampler, which refuses them.
                chosen = chooses[place] and token != NOT_FINITE
                answers[place] = token if chosen else _to_host(row)
        return answers

    def close(self) -> None:
        """Free weights and pages."""
        del self._decode, self._prefill, self._vision, self._tables, self._staging
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, batch: Sequence[SequenceInput]) -> tuple[list[int], Tensor]:
        """Launch a step. Sequences of one new token are run together, all others as packed parts of
        prompts. Returns logits float32 `[n, vocab]`, valid until the next step, and whose they are.
        """
        self._staging.clear()
        decoding = [place for place, given in enumerate(batch) if _is_decode(given)]
        parts = [place for place, given in enumerate(batch) if not _is_decode(given)]
        in_use: set[int] = set()
        pending: list[PendingTiles] = []
        self._decode.fill([batch[place] for place in decoding], in_use, pending)
        prepared = self._prefill.prepare([batch[place] for place in parts], in_use, pending)
        self._staging.send()
        for tiles in pending:
            self._tables.store(tiles)
        logits: list[Tensor] = []
        if decoding:
            logits.append(self._decode.run(len(decoding)))
        if prepared is not None:
            logits.append(self._prefill.run(prepared))
        wanted = decoding + [place for place in parts if batch[place].needs_logits]
        return wanted, logits[0] if len(logits) == 1 else torch.cat(logits)

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


def _to_host(logits: Tensor) -> Float32Array:
    array: Float32Array = logits.cpu().numpy()
    return array
