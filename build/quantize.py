"""Quantize a 16-bit checkpoint in the course of a build."""

from dataclasses import replace
from pathlib import Path

from framesink.build.accuracy import AccuracyTable
from framesink.build.footage import Footage
from framesink.build.options import BuildOptions
from framesink.build.reporter import Reporter
from framesink.build.source import BuildInput, stream_settings
from framesink.calibration.observers import Observer
from framesink.calibration.quantize import QuantizeSummary, quantize_checkpoint
from framesink.calibration.recipe import Recipe
from framesink.calibration.statistics import Statistics
from framesink.runtime.manifest import Limits
from framesink.runtime.models.checkpoint import Checkpoint


def calibrate(
    source: BuildInput,
    options: BuildOptions,
    limits: Limits,
    videos: tuple[Path, ...],
    footage: Footage | None,
    reporter: Reporter,
) -> Statistics:
    """Stream `videos` (none: a generated scene) through the checkpoint in torch and record every
    layer; with `footage`, which shares out the same videos, only what is not held back.

    Raises what `framesink.calibration.streaming.observe_streaming` raises.
    """
    # Imported here: only calibration needs torch.
    from framesink.calibration.streaming import observe_streaming

    statistics = observe_streaming(
        source.checkpoint,
        stream_settings(source, limits),
        videos,
        chunks=options.calibration_chunks if footage is None else sum(footage.calibrated),
        shares=None if footage is None else footage.calibrated,
        device=options.device,
        on_progress=reporter.progress,
    )
    if footage is None:
        return statistics
    return replace(statistics, source=footage.calibration_source)


def compare(
    source: BuildInput,
    recipe: Recipe | None,
    statistics: Statistics,
    options: BuildOptions,
    limits: Limits,
    footage: Footage,
    reporter: Reporter,
) -> AccuracyTable:
    """What every precision costs on the video that was held back.

    Raises what `framesink.build.comparison.Comparison.measure` raises.
    """
    # Imported here: it needs torch.
    from framesink.build.comparison import Comparison

    return Comparison(
        source.checkpoint,
        statistics,
        stream_settings(source, limits),
        footage,
        recipe,
        Observer(options.observer or Observer.ABSMAX),
        options.device,
    ).measure(reporter.progress)


def quantize(
    source: BuildInput,
    recipe: Recipe,
    statistics: Statistics | None,
    options: BuildOptions,
    directory: Path,
    reporter: Reporter,
) -> tuple[Checkpoint, list[str]]:
    """Write the quantized checkpoint to `directory`; also returns what a person should know of it.

    Raises what `framesink.calibration.quantize.quantize_checkpoint` raises.
    """
    summary = quantize_checkpoint(
        source.checkpoint,
        statistics,
        recipe,
        directory,
        observer=Observer(options.observer or Observer.ABSMAX),
        on_progress=reporter.progress,
    )
    return Checkpoint.open(directory), notes_of(summary)


def notes_of(summary: QuantizeSummary) -> list[str]:
    """What a person should know of a checkpoint that was quantized."""
    notes = [
        f"{len(names)} linear layers are held otherwise than asked for, in {reason}."
        for reason, names in summary.replaced.items()
    ]
    dead = {
        "output channels of weights": summary.dead_rows,
        "input channels": summary.dead_inputs,
        "channels of K and heads of V": summary.dead_cache,
    }
    found = ", ".join(f"{count} {name}" for name, count in dead.items() if count)
    if found:
        notes.append(f"Always 0 on the calibration video, and given the smallest scale: {found}.")
    return notes
