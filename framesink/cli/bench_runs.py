"""The benchmarks, run on what the options of `framesink bench` ask for."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from framesink.bench.chunk import measure_chunks
from framesink.bench.concurrency import measure_concurrency
from framesink.bench.endurance import measure_endurance
from framesink.bench.floors import ChunkShape, GpuRates
from framesink.bench.input import clip_chunks, generated_chunks, repeated
from framesink.bench.precisions import Precisions
from framesink.bench.report import (
    chunk_table,
    concurrency_table,
    endurance_table,
    serve_table,
    streams_table,
)
from framesink.bench.report_json import Report
from framesink.bench.roofline_report import RooflineReport, roofline_table
from framesink.bench.streams import measure_streams
from framesink.bench.workload import describe_workload
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import OptionError
from framesink.runtime.garbage import pass_over_what_is_loaded
from framesink.runtime.policies import SinkWindow
from framesink.runtime.preprocess import Grid, frame_grid, resize_frames
from framesink.runtime.session_plan import default_policy
from framesink.runtime.video.chunk import Chunk

Benchmark = Literal["chunk", "endurance", "concurrency", "streams", "serve", "roofline"]
_CHUNKS = {"chunk": 60, "endurance": 3600, "concurrency": 20, "serve": 200}
# Time per chunk is that of full windows; sessions at once are compared from their first token.
_WARMUP = {"chunk": 18, "endurance": 18, "concurrency": 3, "streams": 18, "serve": 10}
_SECONDS = 20.0
# What sessions begin with, so that their windows of text are full from the start.
_PREVIOUS_TEXT = "The clouds go by. " * 200


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of `framesink bench`; `frame_size` is (height, width)."""

    engines: Path | None
    random_weights: str | None
    precisions: Precisions
    clip: Path | None
    frame_size: tuple[int, int]
    chunks: int | None
    warmup: int | None
    seconds: float | None
    sessions: int
    counts: list[int] | None
    find: bool
    by_deadline: bool
    frame_format: Literal["jpeg", "png", "raw"]
    sink_text: int | None
    recent_text: int | None
    vision_seconds: float | None
    max_new_tokens: int | None
    executor: str
    threads: int | None

    @property
    def windows(self) -> Mapping[str, Any]:
        """The windows that were asked for."""
        given = {
            "sink_text": self.sink_text,
            "recent_text": self.recent_text,
            "vision_seconds": self.vision_seconds,
        }
        return {name: value for name, value in given.items() if value is not None}

    def live_counts(self) -> list[int]:
        """Numbers of live streams to hold."""
        return self.counts or sorted({1, self.sessions})

    def endurance_streams(self) -> int:
        """How many streams run for long. Raises OptionError for several numbers."""
        counts = self.counts or [1]
        if len(counts) > 1:
            raise OptionError("An endurance run has one number of streams; give --streams N.")
        return counts[0]


@dataclass(frozen=True, slots=True)
class OpenBench:
    """An engine to measure, and what to measure it with."""

    options: BenchOptions
    engine: StreamingEngine
    policy: SinkWindow

    def video(self, seed: int) -> Iterator[Chunk]:
        """The clip, or generated frames, without an end."""
        fps, chunk_seconds = self.engine.preprocess.fps, self.engine.defaults.chunk_seconds
        if self.options.clip is not None:
            return clip_chunks(self.options.clip, fps, chunk_seconds)
        return generated_chunks(*self.options.frame_size, fps, chunk_seconds, seed)

    def repeated_video(self, seed: int) -> Iterator[Chunk]:
        """Its first chunks, without an end and without the work of making more."""
        return repeated(self.video(seed))

    @property
    def precision(self) -> str:
        """What the model's parts are held in, in words."""
        engines = self.options.engines
        return str(self.options.precisions) if engines is None else f"of the bundle {engines.name}"

    @property
    def workload(self) -> str:
        """What a session is given, in words."""
        options, engine = self.options, self.engine
        chunk = next(self.video(0))
        resized = resize_frames(chunk.frames, engine.preprocess)
        model = f"Qwen2.5-VL-{(options.random_weights or '').upper()} sizes, random weights"
        if options.engines is not None:
            model = f"the bundle {options.engines.name}"
        return describe_workload(
            self.policy,
            model=model,
            frame_size=(chunk.frames.shape[1], chunk.frames.shape[2]),
            frames=len(chunk.frames),
            grid=frame_grid(resized, engine.preprocess),
            merge_size=engine.preprocess.merge_size,
            chunk_seconds=engine.defaults.chunk_seconds,
            max_new_tokens=options.max_new_tokens or engine.defaults.max_new_tokens,
        )

    def chunks(self, name: Benchmark) -> int:
        """How many chunks a benchmark runs."""
        return self.options.chunks or _CHUNKS[name]

    def warmup(self, name: Benchmark) -> int:
        """How many are not counted: of an endurance run, until the recent text is all replies,
        since the host's work grows with their number."""
        replies = 0
        if name == "endurance":
            longest = self.options.max_new_tokens or self.engine.defaults.max_new_tokens
            replies = math.ceil(self.policy.recent_text / longest)
        return self.options.warmup or _WARMUP[name] + replies


@contextmanager
def open_bench(options: BenchOptions, benchmarks: Sequence[Benchmark]) -> Iterator[OpenBench]:
    """An engine with room for all of `benchmarks`. Raises what loading it raises."""
    rooms = {
        "concurrency": options.sessions,
        "streams": max(options.live_counts()),
        "endurance": options.endurance_streams() if "endurance" in benchmarks else 1,
    }
    with _open_engine(options, max(rooms.get(name, 1) for name in benchmarks)) as engine:
        pass_over_what_is_loaded()
        policy = replace(default_policy(engine.defaults), **options.windows)
        yield OpenBench(options, engine, policy)


def run_benchmark(name: Benchmark, opened: OpenBench, console: Console) -> tuple[Report, Table]:
    """Run one that needs an engine."""
    run: Mapping[Benchmark, Callable[[], tuple[Report, Table]]] = {
        "chunk": lambda: _run_chunk(opened),
        "endurance": lambda: _run_endurance(opened, console),
        "streams": lambda: _run_streams(opened),
        "concurrency": lambda: _run_concurrency(opened),
        "serve": lambda: _run_serve(opened),
    }
    return run[name]()


def run_roofline(options: BenchOptions) -> tuple[RooflineReport, Table]:
    """The roofline at the sizes of the workload W720: 720 vision tokens a second, kept for 16 s."""
    from framesink.build.random_checkpoint import SIZES, write_random_description

    size = options.random_weights
    if size is None or size not in SIZES:
        raise OptionError(f"Give --random-weights, one of {', '.join(SIZES)}, for a roofline.")
    try:
        from framesink.bench.roofline import measure_roofline
    except ModuleNotFoundError as error:
        raise OptionError(
            f"A roofline needs the package {error.name}; install framesink[cuda]."
        ) from error
    with TemporaryDirectory() as directory:
        config = write_random_description(size, Path(directory))
    report = measure_roofline(
        f"W720 on {size}",
        config,
        options.precisions,
        ChunkShape(Grid(1, 40, 72), prompt=748, context=13_312, steps=19),
        sequences=(1, 8, 40),
    )
    return report, roofline_table(report)


def _run_chunk(opened: OpenBench) -> tuple[Report, Table]:
    options = opened.options
    report = measure_chunks(
        opened.engine,
        opened.video(0),
        chunks=opened.chunks("chunk"),
        warmup=opened.warmup("chunk"),
        policy=opened.policy,
        max_new_tokens=options.max_new_tokens,
        previous_text=_PREVIOUS_TEXT,
        gpu=_gpu(opened),
    )
    return report, chunk_table(report)


def _run_streams(opened: OpenBench) -> tuple[Report, Table]:
    options = opened.options
    report = measure_streams(
        opened.engine,
        opened.repeated_video,
        counts=options.live_counts(),
        seconds=options.seconds or _SECONDS,
        warmup=opened.warmup("streams"),
        find=options.find,
        by_deadline=options.by_deadline,
        policy=opened.policy,
        max_new_tokens=options.max_new_tokens,
        previous_text=_PREVIOUS_TEXT,
    )
    return report, streams_table(report)


def _run_endurance(opened: OpenBench, console: Console) -> tuple[Report, Table]:
    options, chunks = opened.options, opened.chunks("endurance")
    streams = options.endurance_streams()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("chunks", total=chunks)
        report = measure_endurance(
            opened.engine,
            opened.video if streams == 1 else opened.repeated_video,
            chunks=chunks,
            warmup=opened.warmup("endurance"),
            streams=streams,
            most_seconds=options.seconds,
            policy=opened.policy,
            max_new_tokens=options.max_new_tokens,
            previous_text=_PREVIOUS_TEXT,
            progress=lambda chunk: progress.update(task, completed=chunk),
        )
    return report, endurance_table(report)


def _run_concurrency(opened: OpenBench) -> tuple[Report, Table]:
    options, warmup = opened.options, opened.warmup("concurrency")
    report = measure_concurrency(
        opened.engine,
        opened.video,
        sessions=options.sessions,
        chunks=opened.chunks("concurrency") + warmup,
        warmup=warmup,
        policy=opened.policy,
        max_new_tokens=options.max_new_tokens,
    )
    return report, concurrency_table(report)


def _run_serve(opened: OpenBench) -> tuple[Report, Table]:
    """A server of the bundle, started for it, against the engine."""
    options = opened.options
    if options.engines is None:
        raise OptionError("A server needs a bundle; give --engines BUNDLE.")
    try:
        from framesink.bench.serve import measure_serving, serving
    except ModuleNotFoundError as error:
        raise OptionError(
            f"A server needs the package {error.name}; install framesink[triton]."
        ) from error
    with serving(options.engines, options.executor, options.threads) as client:
        report = measure_serving(
            opened.engine,
            client,
            opened.video(0),
            chunks=opened.chunks("serve"),
            warmup=opened.warmup("serve"),
            frame_format=options.frame_format,
            windows=options.windows,
            max_new_tokens=options.max_new_tokens,
        )
    return report, serve_table(report)


def _open_engine(options: BenchOptions, sessions: int) -> StreamingEngine:
    """The engine of a bundle, or one of random weights."""
    if (options.engines is None) == (options.random_weights is None):
        raise OptionError("Give one of --engines BUNDLE and --random-weights SIZE.")
    if options.engines is not None:
        return StreamingEngine.load(
            options.engines, options.executor, max_sessions=sessions, threads=options.threads
        )
    # Needs torch and a GPU, which other benchmarks do without.
    from framesink.bench.random_engine import open_random_engine

    return open_random_engine(
        cast(str, options.random_weights),
        options.precisions,
        sessions=sessions,
        frame_size=options.frame_size,
    )


def _gpu(opened: OpenBench) -> tuple[GpuRates, Precisions] | None:
    """What the floors of random weights follow from; a bundle's are not worked out."""
    if opened.options.random_weights is None:
        return None
    from framesink.bench.rates import measure_rates

    precisions = opened.options.precisions
    used = {precisions.blocks, precisions.head, precisions.vision}
    return measure_rates(used), precisions
