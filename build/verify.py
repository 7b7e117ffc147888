"""Compare a bundle's graphs with its checkpoint in transformers: same frames, same tokens.

The reference computes in float32, densely; the bundle runs its own graphs through ONNX Runtime,
its prompt in two parts over paged context, then token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from framesink.calibration.prompt import build_prompt
from framesink.calibration.samples import generate_chunks
from framesink.runtime.arrays import BoolArray, Float32Array, Int32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import VerificationError
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import ContextView, Executor, SequenceInput
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.preprocess import Grid, frames_to_patches

CHUNKS = 2
DEFAULT_TOKENS = 32
# Root mean square of the error over that of the values; 16-bit weights and activations stay an
# order of magnitude below.
MAX_LOGIT_ERROR = 0.05
MAX_VISION_ERROR = 0.05


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """How far a bundle is from its checkpoint.

    Errors of logits are over all compared positions; the relative ones are root mean squares over
    that of the reference (logits taken from their mean). `agreeing_tokens` counts greedy tokens
    equal to the reference's before the first that differs, of `tokens`; `top1_agreement` compares
    each position after the reference's own tokens.
    """

    tokens: int
    agreeing_tokens: int
    top1_agreement: float
    max_logit_error: float
    mean_logit_error: float
    relative_logit_error: float
    max_vision_error: float
    relative_vision_error: float

    def check(self) -> None:
        """Raises VerificationError if an error is beyond its tolerance."""
        for name, found, limit in (
            ("logits", self.relative_logit_error, MAX_LOGIT_ERROR),
            ("vision embeddings", self.relative_vision_error, MAX_VISION_ERROR),
        ):
            if not found <= limit:
                raise VerificationError(
                    f"The bundle's {name} differ from the checkpoint's by {found:.2%}, more than "
                    f"the {limit:.0%} allowed."
                )


def verify_bundle(
    bundle: Bundle,
    checkpoint_directory: Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    on_stage: Callable[[str], None] = lambda _: None,
) -> VerificationReport:
    """Run bundle and checkpoint over the same generated frames and `tokens` greedy tokens.

    Raises VerificationError if the checkpoint is of another model or transformers is missing, and
    CheckpointError if the checkpoint cannot be read.
    """
    checkpoint = Checkpoint.open(checkpoint_directory)
    if checkpoint.config != bundle.manifest.model:
        raise VerificationError(
            f"{checkpoint_directory} is not the checkpoint of {bundle.directory}: their sizes "
            "differ."
        )
    require_reference()
    preprocess, streaming = bundle.manifest.preprocess, bundle.manifest.streaming
    frames = max(1, round(preprocess.fps * streaming.chunk_seconds))
    chunks = [
        frames_to_patches(chunk, preprocess) for chunk in islice(generate_chunks(frames), CHUNKS)
    ]
    ids, positions = build_prompt(
        bundle.protocol(),
        checkpoint.config,
        preprocess,
        [grid for _, grid in chunks],
        streaming.chunk_seconds,
    )
    on_stage("the checkpoint in transformers")
    expected = _run_reference(checkpoint_directory, chunks, ids, positions, tokens)
    on_stage("the bundle in ONNX Runtime")
    found = _run_bundle(bundle, chunks, ids, positions, expected.tokens)
    return _compare(expected, found)


def require_reference() -> None:
    """Raises VerificationError if torch or transformers is not installed."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise VerificationError(
            f"Comparing with a checkpoint needs {' and '.join(missing)}; install the reference "
            "with pip install 'framesink[reference]'."
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Vision embeddings `[v, hidden]`, logits `[tokens, vocab]` and the greedy token of each."""

    vision: Float32Array
    logits: Float32Array

    @property
    def tokens(self) -> list[int]:
        return [int(token) for token in self.logits.argmax(axis=-1)]


def _compare(expected: _Run, found: _Run) -> VerificationReport:
    same = [a == b for a, b in zip(expected.tokens, found.tokens, strict=True)]
    error = np.abs(found.logits - expected.logits)
    centered = expected.logits - expected.logits.mean(axis=-1, keepdims=True)
    vision_error = np.abs(found.vision - expected.vision)
    return VerificationReport(
        tokens=len(same),
        agreeing_tokens=same.index(False) if False in same else len(same),
        top1_agreement=sum(same) / len(same),
        max_logit_error=float(error.max()),
        mean_logit_error=float(error.mean()),
        relative_logit_error=_root_mean_square(error) / _root_mean_square(centered),
        max_vision_error=float(vision_error.max()),
        relative_vision_error=_root_mean_square(vision_error) / _root_mean_square(expected.vision),
    )


def _root_mean_square(values: Float32Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _run_reference(
    directory: Path,
    chunks: Sequence[tuple[Float32Array, Grid]],
    ids: Int32Array,
    positions: Int32Array,
    tokens: int,
) -> _Run:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        vision = torch.cat(
            [
                model.model.visual(
                    torch.from_numpy(patches),
                    grid_thw=torch.tensor([[grid.t, grid.h, grid.w]]),
                ).pooler_output
                for patches, grid in chunks
            ]
        )
        text = model.model.language_model
        embeddings = text.embed_tokens(torch.from_numpy(ids.astype(np.int64)))
        embeddings[torch.from_numpy(ids == model.config.video_token_id)] = vision
        places = torch.from_numpy(positions.astype(np.int64))
        cache: Any = None
        logits = []
        for _ in range(tokens):
            output = text(
                inputs_embeds=embeddings[None],
                position_ids=places[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits.append(model.lm_head(output.last_hidden_state[0, -1]))
            embeddings = text.embed_tokens(logits[-1].argmax()[None])
            places = places.max() + torch.ones((3, 1), dtype=torch.int64)
    return _Run(vision.numpy(), torch.stack(logits).numpy())


def _run_bundle(
    bundle: Bundle,
    chunks: Sequence[tuple[Float32Array, Grid]],
    ids: Int32Array,
    positions: Int32Array,
    forced: Sequence[int],
) -> _Run:
    """The bundle's vision embeddings, and its logits before each of the tokens `forced` on it."""
    page_size = bundle.manifest.page_size
    pages = -(-(len(ids) + len(forced)) // page_size)
    executor, _ = create_executor(bundle, "onnxruntime", num_pages=pages + 1)
    try:
        vision = np.concatenate([executor.encode_vision(*chunk) for chunk in chunks])
        following = positions.max() + 1 + np.arange(len(forced), dtype=np.int32)
        sequence = _PagedSequence(
            ids=np.concatenate([ids, np.array(forced, dtype=np.int32)]),
            positions=np.concatenate([positions, np.tile(following, (3, 1))], axis=1),
            vision=vision,
            is_vision=np.concatenate(
                [ids == bundle.manifest.model.video_token_id, np.zeros(len(forced), np.bool_)]
            ),
        )
        # Cut inside a vision block, so that one attends to its own first part in pages.
        sequence.step(executor, 0, len(ids) // 2)
        logits = [sequence.step(executor, len(ids) // 2, len(ids))]
        for index in range(len(ids), len(ids) + len(forced) - 1):
            logits.append(sequence.step(executor, index, index + 1))
    finally:
        executor.close()
    return _Run(vision, np.stack(logits))


@dataclass(frozen=True, slots=True, eq=False)
class _PagedSequence:
    """One sequence whose row i lies in slot page_size + i, after the null page."""

    ids: Int32Array
    positions: Int32Array
    vision: Float32Array
    is_vision: BoolArray

    def step(self, executor: Executor, start: int, end: int) -> Float32Array:
        """Run tokens `start` to `end` and return the logits `[vocab]` of the last of them."""
        size = executor.page_size
        pages = max(1, -(-start // size))
        context_positions = np.zeros((3, pages * size), dtype=np.int32)
        context_positions[:, :start] = self.positions[:, :start]
        first = int(self.is_vision[:start].sum())
        count = int(self.is_vision[start:end].sum())
        (logits,) = executor.step(
            [
                SequenceInput(
                    token_ids=self.ids[start:end],
                    vision_embeddings=self.vision[first : first + count] if count else None,
                    positions=self.positions[:, start:end],
                    slots=np.arange(size + start, size + end, dtype=np.int32),
                    context=ContextView(
                        block_table=np.arange(1, pages + 1, dtype=np.int32),
                        positions=context_positions,
                        valid=np.arange(pages * size) < start,
                    ),
                    needs_logits=True,
                )
            ]
        )
        assert logits is not None
        return logits
