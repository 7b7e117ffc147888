"""Find out how large a checkpoint's activations become, and so which compute type is safe.

A bf16 checkpoint may hold layers whose outputs leave fp16's range: compiled in fp16 it would answer
in NaN. The whole model is run in float32 on a few chunks of video, without torch.
"""

import dataclasses
from collections.abc import Callable, Sequence

from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.observer import RangeObserver
from framesink.calibration.prompt import build_prompt, embed_prompt
from framesink.calibration.ranges import ActivationRanges
from framesink.calibration.text_forward import run_language_model
from framesink.calibration.vision_forward import run_vision_encoder
from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.preprocess import Grid, PreprocessConfig, frames_to_patches
from framesink.runtime.protocol import ChatProtocol

# Magnitudes hardly depend on the resolution, the time of this forward does.
MAX_PIXELS = 448 * 448
CHUNKS_PER_PASS = 2


def observe_activations(
    checkpoint: Checkpoint,
    protocol: ChatProtocol,
    preprocess: PreprocessConfig,
    chunks: Sequence[UInt8Array],
    *,
    chunk_seconds: float,
    source: str,
    on_progress: Callable[[float], None] = lambda _: None,
) -> ActivationRanges:
    """Run the checkpoint in float32 over `chunks` (frames uint8 `[T, H, W, 3]` each).

    `source` says in words where the chunks come from. Raises CheckpointError, naming the layer, at
    the first NaN or infinity.
    """
    smaller = dataclasses.replace(
        preprocess,
        max_pixels=min(preprocess.max_pixels, MAX_PIXELS),
        min_pixels=min(preprocess.min_pixels, MAX_PIXELS),
    )
    vision, text = RangeObserver(), RangeObserver()
    tokens = patch_count = 0
    passes = [chunks[i : i + CHUNKS_PER_PASS] for i in range(0, len(chunks), CHUNKS_PER_PASS)]
    for number, group in enumerate(passes):
        grids: list[Grid] = []
        embedded: list[Float32Array] = []
        for frames in group:
            patches, grid = frames_to_patches(frames, smaller)
            patch_count += len(patches)
            grids.append(grid)
            embedded.append(run_vision_encoder(checkpoint, patches, grid, vision))
        on_progress((number + 0.3) / len(passes))
        ids, positions = build_prompt(protocol, checkpoint.config, smaller, grids, chunk_seconds)
        tokens += len(ids)
        run_language_model(checkpoint, embed_prompt(checkpoint, ids, embedded), positions, text)
        on_progress((number + 1) / len(passes))
    return ActivationRanges(
        checkpoint=checkpoint_fingerprint(checkpoint),
        source=source,
        chunks=len(chunks),
        tokens=tokens,
        patches=patch_count,
        vision_encoder=vision.ranges(),
        language_model=text.ranges(),
    )
