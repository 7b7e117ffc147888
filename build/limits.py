"""What a bundle's profiles are built for, from options and model sizes."""

import math

from framesink.build.options import DEFAULT_MAX_PREFILL, BuildOptions
from framesink.build.plans.profiles import largest_frame
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import PreprocessConfig


def choose_limits(
    options: BuildOptions,
    config: ModelConfig,
    preprocess: PreprocessConfig,
    streaming: StreamingDefaults,
) -> Limits:
    """The limits asked for, completed from the model.

    Raises BuildError when they contradict each other or the model.
    """
    frame = largest_frame(preprocess, config.vision)
    frames_per_chunk = math.ceil(preprocess.fps * streaming.chunk_seconds)
    steps = math.ceil(frames_per_chunk / preprocess.temporal_patch_size)
    max_patches = options.max_patches or steps * frame
    max_context = min(options.max_context, config.text.max_position_embeddings)
    if max_patches < frame:
        raise BuildError(
            f"--max-patches {max_patches} is less than the {frame} patches of one frame of "
            f"{preprocess.max_pixels} pixels; raise it, or lower max_pixels in the checkpoint's "
            "streaming_config.json."
        )
    max_prefill = options.max_prefill or min(DEFAULT_MAX_PREFILL, max_context)
    if max_prefill > max_context:
        raise BuildError(
            f"--max-prefill {max_prefill} is more than the context of {max_context} tokens."
        )
    return Limits(
        max_streams=options.max_streams,
        max_context=max_context,
        max_prefill=max_prefill,
        max_patches=max_patches,
    )
