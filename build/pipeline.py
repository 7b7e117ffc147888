"""The whole of `build-engines`: observe, convert, author, compile, bundle."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from framesink.build.bundle_writer import (
    CACHE_PRECISIONS,
    PART_NAMES,
    PRECISIONS,
    WEIGHTS_NAME,
    BundleWriter,
    tool_versions,
)
from framesink.build.checkpoint_files import (
    StreamingConfig,
    companion_files,
    read_preprocess_config,
    read_streaming_config,
)
from framesink.build.estimate import compiled_bytes, estimate_build
from framesink.build.host import available_memory, free_disk
from framesink.build.limits import choose_limits
from framesink.build.memory import PeakMemory
from framesink.build.options import CALIBRATION_CHUNKS, BuildOptions
from framesink.build.plans.builder import PlanBuilder, choose_builder
from framesink.build.plans.jobs import CompileJob
from framesink.build.plans.messages import BuilderMessage
from framesink.build.plans.process import compile_in_process
from framesink.build.plans.profiles import language_model_profiles, vision_profiles
from framesink.build.reporter import BuildSummary, Reporter, StageResult
from framesink.build.staging import check_output, staged_directory
from framesink.calibration.activation_range import observe_activations
from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.ranges import FLOAT16_MAX, RANGES_NAME, ActivationRanges
from framesink.calibration.samples import sample_chunks
from framesink.runtime.errors import BuildError, CheckpointError
from framesink.runtime.manifest import (
    ComputeType,
    GraphSpec,
    Limits,
    Manifest,
    PartName,
    PartSpec,
    PlanSpec,
)
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.weights import EMBEDDING
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

# Up to this many bytes of 16-bit weights ONNX Runtime computes in float32: it is faster on a CPU,
# but takes the weights' size twice over in memory.
FLOAT32_WEIGHT_LIMIT = 2_000_000_000


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
    """Activation ranges of a checkpoint, on the given videos or a generated scene."""
    seconds = source.streaming.chunk_seconds
    chunks = sample_chunks(
        videos, source.preprocess, chunk_seconds=seconds, count=CALIBRATION_CHUNKS
    )
    return observe_activations(
        source.checkpoint,
        source.protocol,
        source.preprocess,
        chunks,
        chunk_seconds=seconds,
        source=", ".join(video.name for video in videos) or "generated scene",
        on_progress=reporter.progress,
    )


def build_bundle(options: BuildOptions, reporter: Reporter) -> BuildSummary:
    """Build an engine bundle; either it is whole at `options.output`, or nothing is left.

    Raises CheckpointError for bad input, CapacityError if the machine is too small, VideoError for
    calibration video that cannot be read, and BuildError for all else.
    """
    options.check_precisions()
    check_output(options.output, force=options.force)
    builder, targets = choose_builder(options.targets) if options.plans else (None, ())
    source = read_build_input(options.checkpoint)
    config = source.checkpoint.config
    limits = choose_limits(options, config, source.preprocess, source.streaming)
    estimate = estimate_build(config, observe=True, plans=options.plans)
    memory, disk = available_memory(), free_disk(options.output)
    estimate.check(available_memory=memory, free_disk=disk)
    reporter.note(
        f"Needs about {estimate.memory / 1e9:.1f} GB of memory and {estimate.disk / 1e9:.1f} GB of "
        f"disk; {memory / 1e9:.1f} GB and {disk / 1e9:.1f} GB are there."
    )
    with staged_directory(options.output) as directory:
        build = _Build(options, source, limits, directory, reporter)
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
    limits: Limits
    directory: Path
    reporter: Reporter
    stages: list[StageResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, builder: PlanBuilder | None, targets: tuple[str, ...]) -> BuildSummary:
        with self._stage("observe activations"):
            ranges = self._activation_ranges()
        compiled_types = self._compute_types(ranges)
        writer = BundleWriter(
            directory=self.directory,
            checkpoint=self.source.checkpoint,
            compiled_types=compiled_types,
            executed_types=self._executed_types(compiled_types),
            page_size=self.options.page_size,
        )
        with self._stage("write weights"):
            writer.write_weights(self.reporter.progress)
        with self._stage("author graphs"):
            graphs = {part: writer.author(part) for part in PART_NAMES}
            writer.copy(self.source.companions)
            ranges.write(self.directory)
            writer.record(RANGES_NAME)
        plans: dict[PartName, tuple[PlanSpec, ...]] = dict.fromkeys(PART_NAMES, ())
        if builder is None:
            self.notes.append(
                "No TensorRT plans were compiled (--no-plans): this bundle runs on ONNX "
                "Runtime alone."
            )
        else:
            for part in PART_NAMES:
                plans[part] = (self._compile(writer, part, graphs[part][1], builder, targets),)
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
        return observe(self.source, self.options.calibration_videos, self.reporter)

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

    def _compile(
        self,
        writer: BundleWriter,
        part: PartName,
        graph: GraphSpec,
        builder: PlanBuilder,
        targets: tuple[str, ...],
    ) -> PlanSpec:
        name = f"compile {part}"
        self.reporter.stage(name)
        path = writer.plan_path(part, targets)
        config = self.source.checkpoint.config
        profiles = (
            language_model_profiles(graph.inputs, self.limits, self.options.page_size)
            if part == "language_model"
            else vision_profiles(graph.inputs, self.limits, config.vision, self.source.preprocess)
        )

        def log(message: BuilderMessage) -> None:
            self.reporter.log(f"{builder.name} {message.severity}: {message.text}")

        result, peak_memory = compile_in_process(
            CompileJob(
                graph=self.directory / graph.path,
                plan=self.directory / path,
                builder=builder.name,
                targets=targets,
                profiles=profiles,
            ),
            on_progress=self.reporter.progress,
            on_message=log,
        )
        writer.record(path)
        self.stages.append(StageResult(name, result.seconds, peak_memory))
        return PlanSpec(
            path=path,
            builder=builder.name,
            builder_version=result.builder_version,
            targets=targets,
            compute_type=graph.compute_type,
            inputs=result.inputs,
            outputs=result.outputs,
            profiles=profiles,
        )

    def _manifest(
        self,
        writer: BundleWriter,
        graphs: Mapping[PartName, tuple[GraphSpec, GraphSpec]],
        plans: Mapping[PartName, tuple[PlanSpec, ...]],
        builder: PlanBuilder | None,
    ) -> Manifest:
        parts = {
            part: PartSpec(
                precision=PRECISIONS[writer.compiled_types[part]],
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
            model=self.source.checkpoint.config,
            preprocess=self.source.preprocess,
            page_size=self.options.page_size,
            cache_precision=CACHE_PRECISIONS[writer.compiled_types["language_model"]],
            limits=self.limits,
            streaming=self.source.streaming.defaults,
            language_model=parts["language_model"],
            vision_encoder=parts["vision_encoder"],
            embedding_tensor=EMBEDDING,
            weights=(WEIGHTS_NAME,),
            versions=versions,
            activation_ranges=RANGES_NAME,
            files=writer.files,
        )
