"""The whole of `build-engines`: observe, quantize, convert, author, judge, compile, bundle."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from framesink.build.accuracy import (
    ACCURACY_NAME,
    READABLE_NAME,
    AccuracyTable,
    read_checkpoint_accuracy,
)
from framesink.build.bundle_writer import WEIGHTS_NAME, BundleWriter, tool_versions
from framesink.build.carried_checkpoint import (
    CHECKPOINT_DIRECTORY,
    carried_quantization,
    check_source,
    write_carried_checkpoint,
)
from framesink.build.estimate import FLOAT32_WEIGHT_LIMIT, compiled_bytes, estimate_build
from framesink.build.footage import Footage, choose_videos, divide_footage
from framesink.build.gate import VERIFICATION_NAME, QualityGate
from framesink.build.host import available_memory, free_disk
from framesink.build.limits import choose_limits
from framesink.build.memory import PeakMemory
from framesink.build.options import BuildOptions
from framesink.build.plans.builder import PlanBuilder, choose_builder, default_targets
from framesink.build.plans.part import PartCompiler
from framesink.build.precision import (
    cache_precision,
    computes_in_fp8,
    linear_schemes,
    part_precision,
)
from framesink.build.quality import judged_chunks, measure_quality
from framesink.build.quantization_plan import QuantizationPlan, plan_quantization
from framesink.build.quantize import calibrate, compare, quantize
from framesink.build.reporter import BuildSummary, Reporter, StageResult
from framesink.build.source import BuildInput, check_streams, observe, read_build_input
from framesink.build.staging import check_output, staged_directory
from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.observers import Observer
from framesink.calibration.ranges import FLOAT16_MAX, RANGES_NAME, ActivationRanges
from framesink.calibration.recipe import Recipe
from framesink.calibration.statistics import Statistics
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import (
    PART_NAMES,
    ComputeType,
    GraphSpec,
    Limits,
    Manifest,
    PartName,
    PartSpec,
    PlanSpec,
)
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import QUANTIZATION_NAME
from framesink.runtime.models.weights import EMBEDDING

QUANTIZED_DIRECTORY = "quantized"


def build_bundle(options: BuildOptions, reporter: Reporter) -> BuildSummary:
    """Build an engine bundle; either it is whole at `options.output`, or nothing is left.

    Raises CheckpointError for bad input, CapacityError if the machine is too small, VideoError for
    calibration video that cannot be read, and BuildError for all else.
    """
    check_output(options.output, force=options.force)
    source = read_build_input(options.checkpoint)
    config = source.checkpoint.config
    wanted = plan_quantization(options, source)
    if options.with_checkpoint:
        check_source(source.checkpoint, wanted.recipe)
    builder: PlanBuilder | None = None
    targets: tuple[str, ...] = ()
    if options.plans:
        builder, targets = choose_builder(options.targets, fp8=computes_in_fp8(wanted.quantization))
    limits = choose_limits(options, config, source.preprocess, source.streaming)
    if wanted.calibrate or wanted.gate is not None:
        check_streams(source, limits, options.page_size)
    estimate = estimate_build(
        config,
        observe=True,
        plans=options.plans,
        quantization=wanted.quantization,
        quantize=wanted.recipe is not None,
        calibrate=wanted.calibrate,
        compare=options.compare,
        gate=wanted.gate is not None,
        carried=carried_quantization(wanted.quantization) if options.with_checkpoint else None,
        context=limits.max_context,
    )
    memory, disk = available_memory(), free_disk(options.output)
    estimate.check(available_memory=memory, free_disk=disk)
    reporter.note(
        f"Needs about {estimate.memory / 1e9:.1f} GB of memory and {estimate.disk / 1e9:.1f} GB of "
        f"disk; {memory / 1e9:.1f} GB and {disk / 1e9:.1f} GB are there."
    )
    checkpoints = [path for path in (options.checkpoint, options.gate_checkpoint) if path]
    videos = choose_videos(options.calibration_videos, checkpoints)
    accuracy = read_checkpoint_accuracy(options.checkpoint)
    with staged_directory(options.output) as directory:
        build = _Build(options, source, wanted, limits, videos, accuracy, directory, reporter)
        try:
            return build.run(builder, targets)
        except OSError as error:
            raise BuildError(
                f"Writing {options.output} failed ({error.strerror or error}); nothing was kept."
            ) from error


@dataclass(slots=True)
class _Build:
    """One run, from an empty staging directory to a whole bundle in it."""

    options: BuildOptions
    source: BuildInput
    wanted: QuantizationPlan
    limits: Limits
    videos: tuple[Path, ...]
    accuracy: AccuracyTable | None
    directory: Path
    reporter: Reporter
    stages: list[StageResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, builder: PlanBuilder | None, targets: tuple[str, ...]) -> BuildSummary:
        self.notes += self.wanted.notes
        footage: Footage | None = None
        if self.wanted.gate is not None or self.options.compare:
            with self._stage("share out video"):
                footage = self._share_out()
        with self._stage("observe activations"):
            ranges = self._activation_ranges()
        compiled_types = self._compute_types(ranges)
        checkpoint = self.source.checkpoint
        statistics: Statistics | None = None
        if self.wanted.calibrate:
            with self._stage("calibrate"):
                statistics = calibrate(
                    self.source, self.options, self.limits, self.videos, footage, self.reporter
                )
            if statistics.constant_channels:
                self.notes.append(
                    f"{statistics.constant_channels} channels of inputs and keys never changed on "
                    "the calibration video; is it a still picture?"
                )
        if self.options.compare and statistics is not None and footage is not None:
            with self._stage("compare precisions"):
                self.accuracy = compare(
                    self.source,
                    self.wanted.recipe,
                    statistics,
                    self.options,
                    self.limits,
                    footage,
                    self.reporter,
                )
        if self.wanted.recipe is not None:
            with self._stage("quantize"):
                checkpoint = self._quantize(self.wanted.recipe, statistics)
        writer = BundleWriter(
            directory=self.directory,
            checkpoint=checkpoint,
            quantization=self.wanted.quantization,
            compiled_types=compiled_types,
            executed_types=self._executed_types(compiled_types),
            page_size=self.options.page_size,
        )
        with self._stage("write weights"):
            writer.write_weights(self.reporter.progress)
        with self._stage("author graphs"):
            graphs = {part: writer.author(part) for part in PART_NAMES}
            writer.copy(self.source.companions)
            if checkpoint.quantization is not None:
                writer.copy([checkpoint.directory / QUANTIZATION_NAME])
            ranges.write(self.directory)
            writer.record(RANGES_NAME)
            if self.accuracy is not None:
                self.accuracy.write(self.directory)
                writer.record(ACCURACY_NAME)
                writer.record(READABLE_NAME)
        if self.wanted.recipe is not None:
            shutil.rmtree(checkpoint.directory)
        if self.options.with_checkpoint:
            with self._stage("write checkpoint"):
                self._carry_checkpoint(writer, statistics)
        plans: dict[PartName, tuple[PlanSpec, ...]] = dict.fromkeys(PART_NAMES, ())
        if self.wanted.gate is not None and footage is not None:
            manifest = self._manifest(writer, graphs, plans, builder)
            with self._stage("quality gate"):
                self._judge(manifest, self.wanted.gate, footage)
            writer.record(VERIFICATION_NAME)
        if builder is None:
            self.notes.append(
                "No TensorRT plans were compiled (--no-plans): this bundle runs on ONNX "
                "Runtime alone."
            )
        else:
            self._note_targets(builder, targets)
            plans = self._compile(writer, graphs, builder, targets)
        manifest = self._manifest(writer, graphs, plans, builder)
        writer.write_manifest(manifest)
        return BuildSummary(self.options.output, manifest, tuple(self.stages), tuple(self.notes))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.reporter.stage(name)
        started = time.monotonic()
        with PeakMemory() as memory:
            yield
        self.stages.append(StageResult(name, time.monotonic() - started, memory.peak))

    def _activation_ranges(self) -> ActivationRanges:
        """Those that `framesink calibrate` left in the checkpoint, if they are of these weights."""
        path = self.options.checkpoint / RANGES_NAME
        if path.is_file() and not self.options.calibration_videos:
            ranges = ActivationRanges.read(path)
            if ranges.checkpoint == checkpoint_fingerprint(self.source.checkpoint):
                return ranges
            self.notes.append(f"{path} belongs to other weights, so the model was observed again.")
        return observe(self.source, self.videos, self.reporter)

    def _compute_types(self, ranges: ActivationRanges) -> dict[PartName, ComputeType]:
        types: dict[PartName, ComputeType] = {}
        for part in PART_NAMES:
            types[part] = ranges.part(part).compute_type
            if types[part] == "bfloat16":
                value, place = ranges.part(part).largest
                self.notes.append(
                    f"The {part} is compiled in bf16: {place} reaches {value:,.0f}, too close to "
                    f"or beyond fp16's {FLOAT16_MAX:,.0f}."
                )
        return types

    def _executed_types(
        self, compiled: Mapping[PartName, ComputeType]
    ) -> dict[PartName, ComputeType]:
        size = sum(compiled_bytes(self.source.checkpoint.config).values())
        default: ComputeType = "float32" if size <= FLOAT32_WEIGHT_LIMIT else "float16"
        # ONNX Runtime has no bf16 matrix product on the CPU.
        return {
            part: self.options.executed_type
            or ("float32" if compute_type == "bfloat16" else default)
            for part, compute_type in compiled.items()
        }

    def _share_out(self) -> Footage:
        """Hold video back from calibration, if there is any; video that a person gives for the gate
        alone is judged on from its beginning."""
        judge = judged_chunks(self.source.checkpoint.config)
        if self.options.calibration_videos and not self.wanted.calibrate:
            return Footage.whole(self.videos, judge)
        return divide_footage(
            self.videos,
            self.source.preprocess,
            self.source.streaming.chunk_seconds,
            calibrate=self.options.calibration_chunks,
            judge=judge,
            on_progress=self.reporter.progress,
        )

    def _quantize(self, recipe: Recipe, statistics: Statistics | None) -> Checkpoint:
        """A quantized checkpoint in a directory of the bundle, for as long as it is needed."""
        checkpoint, notes = quantize(
            self.source,
            recipe,
            statistics,
            self.options,
            self.directory / QUANTIZED_DIRECTORY,
            self.reporter,
        )
        self.notes += notes
        return checkpoint

    def _carry_checkpoint(self, writer: BundleWriter, statistics: Statistics | None) -> None:
        """A checkpoint of the bundle's own precision, as far as TensorRT-LLM reads it."""
        files, notes = write_carried_checkpoint(
            self.source.checkpoint,
            self.wanted.recipe,
            statistics,
            self.directory,
            observer=Observer(self.options.observer or Observer.ABSMAX),
            on_progress=self.reporter.progress,
        )
        self.notes += notes
        for path in files:
            writer.record(f"{CHECKPOINT_DIRECTORY}/{path.name}")

    def _judge(self, manifest: Manifest, gate: QualityGate, footage: Footage) -> None:
        """Measure the bundle as far as it is written; what was measured goes into it."""
        bundle = Bundle(self.directory, manifest)
        measured = measure_quality(
            bundle,
            self.options.gate_checkpoint or self.options.checkpoint,
            footage,
            on_progress=self.reporter.progress,
        )
        measured.check(gate, video_option="--calibration-video")
        measured.model_copy(update={"gate": str(gate)}).write(self.directory)

    def _note_targets(self, builder: PlanBuilder, targets: tuple[str, ...]) -> None:
        """Say which of the architectures meant by default lack what the bundle needs."""
        left_out = [name for name in default_targets(builder) if name not in targets]
        if left_out and not self.options.targets:
            self.notes.append(
                f"Compiled for {', '.join(targets)}; {', '.join(left_out)} were left out, which "
                "lack FP8."
            )

    def _compile(
        self,
        writer: BundleWriter,
        graphs: Mapping[PartName, tuple[GraphSpec, GraphSpec]],
        builder: PlanBuilder,
        targets: tuple[str, ...],
    ) -> dict[PartName, tuple[PlanSpec, ...]]:
        compiler = PartCompiler(
            self.directory,
            builder,
            targets,
            self.limits,
            self.options.page_size,
            self.source.checkpoint.config,
            self.source.preprocess,
        )
        plans: dict[PartName, tuple[PlanSpec, ...]] = {}
        for part in PART_NAMES:
            path = writer.plan_path(part, targets)
            plan, stage = compiler.compile(part, graphs[part][1], path, self.reporter)
            writer.record(path)
            self.stages.append(stage)
            plans[part] = (plan,)
        return plans

    def _manifest(
        self,
        writer: BundleWriter,
        graphs: Mapping[PartName, tuple[GraphSpec, GraphSpec]],
        plans: Mapping[PartName, tuple[PlanSpec, ...]],
        builder: PlanBuilder | None,
    ) -> Manifest:
        config, quantization = self.source.checkpoint.config, self.wanted.quantization
        parts = {
            part: PartSpec(
                precision=part_precision(config, quantization, part, writer.compiled_types[part]),
                linears=linear_schemes(config, quantization, part),
                executed=graphs[part][0],
                compiled=graphs[part][1],
                plans=plans[part],
            )
            for part in PART_NAMES
        }
        versions = tool_versions({} if builder is None else {builder.name: builder.version})
        return Manifest(
            framesink_version=versions["framesink"],
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model_name=self.options.checkpoint.resolve().name,
            model=config,
            preprocess=self.source.preprocess,
            page_size=self.options.page_size,
            cache_precision=cache_precision(quantization, writer.compiled_types["language_model"]),
            limits=self.limits,
            streaming=self.source.streaming.defaults,
            language_model=parts["language_model"],
            vision_encoder=parts["vision_encoder"],
            embedding_tensor=EMBEDDING,
            weights=(WEIGHTS_NAME,),
            versions=versions,
            activation_ranges=RANGES_NAME,
            verification=VERIFICATION_NAME if VERIFICATION_NAME in writer.files else None,
            accuracy=ACCURACY_NAME if ACCURACY_NAME in writer.files else None,
            checkpoint=CHECKPOINT_DIRECTORY if self.options.with_checkpoint else None,
            files=writer.files,
        )
