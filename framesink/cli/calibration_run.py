"""What `framesink calibrate` does where something is quantized: observe, rank, write."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from framesink.build.accuracy import AccuracyTable
from framesink.build.device import check_device
from framesink.build.footage import Footage, choose_videos, divide_footage
from framesink.build.limits import choose_limits
from framesink.build.options import BuildOptions, ObserverName
from framesink.build.quality import judged_chunks
from framesink.build.reporter import Reporter
from framesink.build.source import BuildInput, check_streams, stream_settings
from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.layouts import Layout
from framesink.calibration.observers import Observer
from framesink.calibration.quantize import (
    QuantizeSummary,
    needs_statistics,
    quantize_checkpoint,
)
from framesink.calibration.recipe import Recipe
from framesink.calibration.statistics import Statistics
from framesink.calibration.statistics_files import (
    STATISTICS_NAME,
    load_statistics,
    save_statistics,
)
from framesink.calibration.videos import (
    DEFAULT_CHUNKS,
    DEFAULT_MINIMUM_CHUNKS,
)
from framesink.runtime.errors import CheckpointError, OptionError, OutputError

# What needs torch is imported where it is used: weights alone are quantized without it.
if TYPE_CHECKING:
    from framesink.calibration.sensitivity import GroupSensitivity, SensitivityReport

RECIPE_NAME = "recipe.toml"
# Every layer runs them all again, so they are few; the windows are full by then.
SENSITIVITY_CHUNKS = 16


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How a checkpoint is observed and written; see the options of `framesink calibrate`."""

    observer: ObserverName = "absmax"
    chunks: int = DEFAULT_CHUNKS
    min_chunks: int = DEFAULT_MINIMUM_CHUNKS
    statistics: Path | None = None
    layout: Literal["framesink", "modelopt", "tensorrt-llm"] = "framesink"
    compare: bool = False
    sensitivity: bool = False
    keep_for_kl: float | None = None
    keep_bytes: int | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Raise OptionError for options that contradict each other."""
        if self.keep_for_kl is not None and self.keep_bytes is not None:
            raise OptionError("--keep-for-kl and --keep-bytes are two budgets; give one of them.")
        budgeted = self.keep_for_kl is not None or self.keep_bytes is not None
        if budgeted and not self.sensitivity:
            raise OptionError("--keep-for-kl and --keep-bytes need --sensitivity.")


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What was seen (None: weights alone are quantized), what was ranked if that was asked for,
    which layers stay in 16-bit because of it, what each precision costs if that was asked for, and
    what was written to `output` by `recipe`."""

    output: Path
    recipe: Recipe
    statistics: Statistics | None
    sensitivity: "SensitivityReport | None"
    kept: "tuple[GroupSensitivity, ...]"
    accuracy: AccuracyTable | None
    summary: QuantizeSummary


def run_calibration(
    build: BuildOptions,
    options: CalibrationOptions,
    source: BuildInput,
    recipe: Recipe,
    reporter: Reporter,
) -> CalibrationResult:
    """Quantize the checkpoint `source` by `recipe` and write it to `build.output`.

    Raises OptionError for options that make no sense, CheckpointError for a checkpoint that cannot
    be quantized, VideoError for video that cannot be used, CapacityError where a stream does not
    fit, and OutputError if nothing can be written.
    """
    options.check()
    statistics: Statistics | None = None
    report: SensitivityReport | None = None
    kept: tuple[GroupSensitivity, ...] = ()
    accuracy: AccuracyTable | None = None
    quantization = recipe.resolve(source.checkpoint.config)
    if options.sensitivity and not quantization.linears:
        raise OptionError("--sensitivity ranks linear layers, and none of them is to be quantized.")
    if options.sensitivity or options.compare or needs_statistics(quantization):
        observation = _Observation(build, options, source, reporter)
        footage = observation.hold_back()
        statistics = observation.observe(footage)
        if footage is not None and options.sensitivity:
            recipe, report, kept = observation.keep_the_worst(recipe, statistics, footage)
        if footage is not None and options.compare:
            accuracy = observation.compare(recipe, statistics, footage)
    reporter.stage("quantize weights")
    summary = quantize_checkpoint(
        source.checkpoint,
        statistics,
        recipe,
        build.output,
        layout=Layout(options.layout),
        observer=Observer(options.observer),
        force=build.force,
        on_progress=reporter.progress,
    )
    recipe.write(build.output / RECIPE_NAME)
    if accuracy is not None:
        _write_accuracy(accuracy, build.output)
    return CalibrationResult(build.output, recipe, statistics, report, kept, accuracy, summary)


class _Observation:
    """All that needs the model to run in torch."""

    def __init__(
        self,
        build: BuildOptions,
        options: CalibrationOptions,
        source: BuildInput,
        reporter: Reporter,
    ) -> None:
        check_device(options.device)
        checkpoint = source.checkpoint
        limits = choose_limits(build, checkpoint.config, source.preprocess, source.streaming)
        check_streams(source, limits, build.page_size)
        self.options = options
        self.checkpoint = checkpoint
        self.reporter = reporter
        self.videos = choose_videos(build.calibration_videos, [build.checkpoint])
        self.settings = stream_settings(source, limits)

    def hold_back(self) -> Footage | None:
        """Which part of the video is kept from calibration, where layers or precisions are judged;
        otherwise it is all calibrated on."""
        if not (self.options.compare or self.options.sensitivity):
            return None
        self.reporter.stage("share out video")
        return divide_footage(
            self.videos,
            self.settings.preprocess,
            self.settings.defaults.chunk_seconds,
            calibrate=self.options.chunks,
            judge=judged_chunks(self.checkpoint.config),
            on_progress=self.reporter.progress,
        )

    def observe(self, footage: Footage | None) -> Statistics:
        """What an earlier run kept, or what the video shows, as far as it is not held back."""
        from framesink.calibration.streaming import observe_streaming

        options, kept = self.options, self.options.statistics
        if kept is not None and (kept / STATISTICS_NAME).is_file():
            statistics = load_statistics(kept)
            if statistics.checkpoint != checkpoint_fingerprint(self.checkpoint):
                raise CheckpointError(
                    f"The statistics in {kept} are those of another checkpoint than "
                    f"{self.checkpoint.directory}; name another directory."
                )
            self.reporter.note(f"Uses the statistics in {kept} ({statistics.source}).")
            if footage is not None and statistics.source != footage.calibration_source:
                self.reporter.note(
                    f"Judges on {footage.judged_source}, which these statistics may have seen."
                )
            return statistics
        self.reporter.stage("observe video")
        statistics = observe_streaming(
            self.checkpoint,
            self.settings,
            self.videos,
            chunks=options.chunks if footage is None else sum(footage.calibrated),
            minimum_chunks=options.min_chunks,
            shares=None if footage is None else footage.calibrated,
            device=options.device,
            on_progress=self.reporter.progress,
        )
        if footage is not None:
            statistics = replace(statistics, source=footage.calibration_source)
        if kept is not None:
            _keep(statistics, kept)
        return statistics

    def compare(self, recipe: Recipe, statistics: Statistics, footage: Footage) -> AccuracyTable:
        """What every precision costs on the video that was held back."""
        from framesink.build.comparison import Comparison

        self.reporter.stage("compare precisions")
        return Comparison(
            self.checkpoint,
            statistics,
            self.settings,
            footage,
            recipe,
            Observer(self.options.observer),
            self.options.device,
        ).measure(self.reporter.progress)

    def keep_the_worst(
        self, recipe: Recipe, statistics: Statistics, footage: Footage
    ) -> "tuple[Recipe, SensitivityReport, tuple[GroupSensitivity, ...]]":
        """Rank the layers on the video that was held back; keep what the budget allows."""
        from framesink.calibration.sensitivity import keep_in_recipe, measure_sensitivity
        from framesink.calibration.simulation import simulate_linears

        options = self.options
        self.reporter.stage("rank layers")
        linears = simulate_linears(
            self.checkpoint,
            statistics,
            recipe.resolve(self.checkpoint.config),
            observer=Observer(options.observer),
            alpha=recipe.smoothquant_alpha,
        )
        seconds = self.settings.defaults.chunk_seconds
        streams = footage.judged_streams(self.settings.preprocess, seconds)
        share = -(-SENSITIVITY_CHUNKS // len(streams))
        report = measure_sensitivity(
            self.checkpoint,
            linears,
            self.settings,
            [islice(stream, share) for stream in streams],
            device=options.device,
            on_progress=self.reporter.progress,
        )
        kept: tuple[GroupSensitivity, ...] = ()
        if options.keep_for_kl is not None:
            kept = report.keep_for_kl(options.keep_for_kl)
        elif options.keep_bytes is not None:
            kept = report.keep_for_bytes(options.keep_bytes)
        return keep_in_recipe(recipe, kept), report, kept


def _keep(statistics: Statistics, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_statistics(statistics, directory)
    except OSError as error:
        raise OutputError(f"Cannot write {directory}: {error.strerror or error}.") from error


def _write_accuracy(table: AccuracyTable, directory: Path) -> None:
    try:
        table.write(directory)
    except OSError as error:
        raise OutputError(f"Cannot write {directory}: {error.strerror or error}.") from error
