"""What a build reads of a checkpoint before it begins, and what it observes first of all."""

from dataclasses import dataclass
from pathlib import Path

from framesink.build.checkpoint_files import (
    StreamingConfig,
    read_preprocess_config,
    read_streaming_config,
)
from framesink.build.options import RANGE_CHUNKS
from framesink.build.reporter import Reporter
from framesink.calibration.activation_range import observe_activations
from framesink.calibration.ranges import ActivationRanges
from framesink.calibration.recorded_turns import StreamSettings
from framesink.calibration.samples import sample_chunks
from framesink.runtime.errors import CheckpointError
from framesink.runtime.manifest import Limits
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.session_plan import default_policy, plan_session
from framesink.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BuildInput:
    """All that is read of a checkpoint before work begins."""

    checkpoint: Checkpoint
    companions: list[Path]
    streaming: StreamingConfig
    preprocess: PreprocessConfig
    protocol: ChatProtocol


def read_build_input(directory: Path) -> BuildInput:
    """Open a checkpoint with everything a build needs of it.

    Raises CheckpointError for anything that is missing, damaged, or does not fit together.
    """
    checkpoint = Checkpoint.open(directory)
    companions = companion_files(directory)
    streaming = read_streaming_config(directory)
    preprocess = read_preprocess_config(directory, streaming, checkpoint.config.vision)
    tokenizer = Tokenizer.from_directory(directory)
    protocol = ChatProtocol(tokenizer, streaming.system_prompt)
    if tokenizer.vocabulary_size > checkpoint.config.text.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {directory} has {tokenizer.vocabulary_size} tokens, but config.json "
            f"has embeddings for {checkpoint.config.text.vocab_size}."
        )
    if protocol.video_pad != checkpoint.config.video_token_id:
        raise CheckpointError(
            f"In the tokenizer of {directory} <|video_pad|> is {protocol.video_pad}, but "
            f"config.json has video_token_id {checkpoint.config.video_token_id}."
        )
    return BuildInput(checkpoint, companions, streaming, preprocess, protocol)


def observe(source: BuildInput, videos: tuple[Path, ...], reporter: Reporter) -> ActivationRanges:
    """Activation ranges of a checkpoint, on the given videos; without any, on a generated scene."""
    seconds = source.streaming.chunk_seconds
    chunks = sample_chunks(videos, source.preprocess, chunk_seconds=seconds, count=RANGE_CHUNKS)
    return observe_activations(
        source.checkpoint,
        source.protocol,
        source.preprocess,
        chunks,
        chunk_seconds=seconds,
        source=", ".join(video.name for video in videos) or "generated scene",
        on_progress=reporter.progress,
    )


def stream_settings(source: BuildInput, limits: Limits) -> StreamSettings:
    """How calibration streams a checkpoint: as it will be served, within `limits`."""
    return StreamSettings(
        source.checkpoint.config,
        source.protocol,
        source.preprocess,
        source.streaming.defaults,
        limits,
    )


def check_streams(source: BuildInput, limits: Limits, page_size: int) -> None:
    """Whether a session with the checkpoint's streaming defaults fits `limits`.

    Raises CapacityError, with the figures, if it does not.
    """
    defaults = source.streaming.defaults
    plan_session(
        default_policy(defaults),
        defaults.query,
        "pinned",
        protocol=source.protocol,
        model=source.checkpoint.config,
        limits=limits,
        page_size=page_size,
        chunk_seconds=defaults.chunk_seconds,
        max_new_tokens=defaults.max_new_tokens,
        max_patches=limits.max_patches,
    )
