"""Bundles of a checkpoint in every precision, calibrated once, as `build-engines` makes them."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.parallel import spread
from framesink.build.footage import choose_videos
from framesink.build.limits import choose_limits
from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.build.source import read_build_input, stream_settings
from framesink.calibration.quantize import quantize_checkpoint
from framesink.calibration.recipe import CachePrecision, LinearPrecision, Recipe
from framesink.calibration.recorded_turns import StreamSettings
from framesink.calibration.statistics import Statistics
from framesink.calibration.statistics_files import (
    STATISTICS_NAME,
    load_statistics,
    save_statistics,
)
from framesink.calibration.streaming import observe_streaming
from framesink.runtime.models.checkpoint import Checkpoint

LINEAR_PRECISIONS: tuple[LinearPrecision, ...] = (
    *("fp16", "fp8", "int8", "int8-weight-only", "int4-weight-only"),
)
CACHE_PRECISIONS: tuple[CachePrecision, ...] = ("fp16", "int8", "fp8")
MAX_STREAMS = 8

Scheme = tuple[LinearPrecision, CachePrecision]


def scheme_name(scheme: Scheme) -> str:
    """A scheme as files are named by it."""
    return f"{scheme[0]}-kv-{scheme[1]}"


def settings_of(checkpoint: Path) -> StreamSettings:
    """How a build of the demo model streams it."""
    source = read_build_input(checkpoint)
    options = BuildOptions(checkpoint, output=checkpoint, max_streams=MAX_STREAMS)
    limits = choose_limits(options, source.checkpoint.config, source.preprocess, source.streaming)
    return stream_settings(source, limits)


def observe(checkpoint: Path, folder: Path) -> Statistics:
    """What a build sees of a checkpoint by default, on the video that it brings; kept in `folder`,
    and read from there."""
    if not (folder / STATISTICS_NAME).exists():
        videos = choose_videos((), [checkpoint])
        statistics = observe_streaming(Checkpoint.open(checkpoint), settings_of(checkpoint), videos)
        folder.mkdir(parents=True, exist_ok=True)
        save_statistics(statistics, folder)
    return load_statistics(folder)


@dataclass(frozen=True, slots=True)
class BuildTask:
    """A bundle to build from a 16-bit checkpoint and what calibration saw of it."""

    checkpoint: Path
    statistics: Path
    scheme: Scheme
    output: Path


def build_bundles(
    checkpoint: Path, statistics: Path, schemes: Sequence[Scheme], folder: Path, processes: int
) -> dict[Scheme, Path]:
    """The bundles of some schemes without plans; those that are there are not built again."""
    outputs = {scheme: folder / scheme_name(scheme) for scheme in schemes}
    tasks = {
        folder / f"{output.name}.json": BuildTask(checkpoint, statistics, scheme, output)
        for scheme, output in outputs.items()
    }
    spread(_build, tasks, processes)
    return outputs


def size_of(bundle: Path) -> int:
    """Bytes of all files of a bundle."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def _build(task: BuildTask) -> int:
    """The size of the bundle."""
    with tempfile.TemporaryDirectory(dir=task.output.parent) as folder:
        source, (precision, cache) = task.checkpoint, task.scheme
        if task.scheme != ("fp16", "fp16"):
            recipe = Recipe(language_model=precision, vision_encoder=precision, kv_cache=cache)
            source = Path(folder) / task.checkpoint.name
            quantize_checkpoint(
                Checkpoint.open(task.checkpoint),
                load_statistics(task.statistics),
                recipe,
                source,
            )
        options = BuildOptions(
            source, task.output, plans=False, judge=False, max_streams=MAX_STREAMS
        )
        build_bundle(options, SilentReporter())
    return size_of(task.output)
