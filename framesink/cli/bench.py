"""`framesink bench`: how fast, how long, how many."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from rich.console import Console
from rich.progress import Progress

from framesink.bench.chunk import measure_chunks
from framesink.bench.concurrency import measure_concurrency
from framesink.bench.endurance import measure_endurance
from framesink.bench.input import clip_chunks, generated_chunks
from framesink.bench.report import (
    Report,
    chunk_table,
    concurrency_table,
    endurance_table,
    require_writable,
    serve_table,
    streams_table,
    write_json,
)
from framesink.bench.roofline_report import RooflineReport, roofline_table
from framesink.bench.streams import measure_streams
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import OptionError
from framesink.runtime.session_plan import default_policy
from framesink.runtime.video.chunk import Chunk

if TYPE_CHECKING:  # it needs the client's packages, which no other benchmark does
    from framesink.bench.serve import ServeReport

_COUNT = click.IntRange(min=1)
# What every stream begins with, so that its windows of text are full from the start.
_PREVIOUS_TEXT = "The clouds go by. " * 200
_Benchmark = Literal["chunk", "endurance", "concurrency", "streams", "serve", "roofline"]
_CHUNKS = {"chunk": 60, "endurance": 3600, "concurrency": 20, "streams": 20, "serve": 200}
# Time per chunk is that of full windows; sessions at once are compared from their first token.
_WARMUP = {"chunk": 20, "endurance": 0, "concurrency": 3, "streams": 18, "serve": 10}


@click.command()
@click.argument("what", type=click.Choice(get_args(_Benchmark)), default="chunk")
@click.option(
    "--engines",
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    help="The engine bundle that build-engines made.",
)
@click.option(
    "--random-weights",
    metavar="SIZE",
    help="Measure a model of random weights, made on the GPU, such as 7b, in place of a bundle.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp8", "int8"]),
    default="fp8",
    show_default=True,
    help="Of the random weights.",
)
@click.option("--clip", type=click.Path(path_type=Path), help="A video to measure with, looped.")
@click.option(
    "--size",
    default="448x448",
    show_default=True,
    metavar="WIDTHxHEIGHT",
    help="Size of generated frames, without --clip.",
)
@click.option("--chunks", type=_COUNT, help="Chunks to run: 60, endurance 3600, concurrency 20.")
@click.option("--warmup", type=_COUNT, help="Chunks not counted: chunk 20, concurrency 3.")
@click.option(
    "--sessions", type=_COUNT, default=16, show_default=True, help="concurrency and streams only."
)
@click.option(
    "--streams",
    metavar="N,N,…",
    help="Numbers of streams to hold, each for --chunks chunks; by default 1 and --sessions.",
)
@click.option(
    "--frame-format",
    type=click.Choice(["jpeg", "png", "raw"]),
    default="jpeg",
    show_default=True,
    help="serve only: how frames travel.",
)
@click.option("--sink-text", type=click.IntRange(min=0), help="First tokens of text kept.")
@click.option("--recent-text", type=click.IntRange(min=0), help="Last tokens of text kept.")
@click.option("--vision-seconds", type=click.FloatRange(min=0), help="Seconds of video kept.")
@click.option("--max-new-tokens", type=_COUNT, help="Longest reply to one chunk.")
@click.option("--executor", default="auto", show_default=True, help="Which executor runs it.")
@click.option("--threads", type=_COUNT, help="CPU threads; by default one per physical core.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures.")
def bench(
    what: _Benchmark,
    engines: Path | None,
    random_weights: str | None,
    precision: str,
    clip: Path | None,
    size: str,
    chunks: int | None,
    warmup: int | None,
    sessions: int,
    streams: str | None,
    frame_format: Literal["jpeg", "png", "raw"],
    sink_text: int | None,
    recent_text: int | None,
    vision_seconds: float | None,
    max_new_tokens: int | None,
    executor: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Measure a bundle on this machine.

    chunk: time per chunk of one session. endurance: one session for very long, to see that nothing
    grows. concurrency: many sessions at once, each compared with itself alone. streams: how many
    live streams the machine holds, in real time. serve: what a server adds to the time to the first
    token and to each further one. roofline: this GPU's memory and matrix rates at the sizes of a
    model of random weights, and the least time a step can take.
    """
    console = Console(highlight=False)
    width, height = _parse_size(size)
    if json_path is not None:
        require_writable(json_path)
    if what == "roofline":
        roofline = _measure_roofline(random_weights, precision)
        console.print(roofline_table(roofline))
        if json_path is not None:
            write_json(roofline, json_path)
        return
    count = chunks or _CHUNKS[what]
    uncounted = warmup or _WARMUP[what]
    counts = _parse_counts(streams) if streams else sorted({1, sessions})
    most = {"concurrency": sessions, "streams": max(counts)}.get(what, 1)
    with _open_engine(
        engines, random_weights, precision, executor, sessions=most, size=size, threads=threads
    ) as engine:
        fps, chunk_seconds = engine.preprocess.fps, engine.defaults.chunk_seconds

        def video(seed: int) -> Iterator[Chunk]:
            if clip is not None:
                return clip_chunks(clip, fps, chunk_seconds)
            return generated_chunks(height, width, fps, chunk_seconds, seed)

        windows: dict[str, Any] = {
            "sink_text": sink_text,
            "recent_text": recent_text,
            "vision_seconds": vision_seconds,
        }
        given = {name: value for name, value in windows.items() if value is not None}
        policy = replace(default_policy(engine.defaults), **given)
        console.print(engine.executor_reason, style="dim")
        report: Report
        if what == "chunk":
            report = measure_chunks(
                engine,
                video(0),
                chunks=count,
                warmup=uncounted,
                policy=policy,
                max_new_tokens=max_new_tokens,
            )
            table = chunk_table(report)
        elif what == "endurance":
            with Progress(
                console=console, transient=True, disable=not console.is_terminal
            ) as progress:
                task = progress.add_task("chunks", total=count)
                report = measure_endurance(
                    engine,
                    progress.track(video(0), total=count, task_id=task),
                    chunks=count,
                    policy=policy,
                    max_new_tokens=max_new_tokens,
                )
            table = endurance_table(report)
        elif what == "streams":
            report = measure_streams(
                engine,
                video,
                counts=counts,
                seconds=count * chunk_seconds,
                warmup=uncounted,
                policy=policy,
                max_new_tokens=max_new_tokens,
                previous_text=_PREVIOUS_TEXT,
            )
            table = streams_table(report)
        elif what == "serve":
            report = _measure_server(
                engine,
                engines,
                video(0),
                executor=executor,
                threads=threads,
                chunks=count,
                warmup=uncounted,
                frame_format=frame_format,
                windows=given,
                max_new_tokens=max_new_tokens,
            )
            table = serve_table(report)
        else:
            report = measure_concurrency(
                engine,
                video,
                sessions=sessions,
                chunks=count + uncounted,
                warmup=uncounted,
                policy=policy,
                max_new_tokens=max_new_tokens,
            )
            table = concurrency_table(report)
    console.print(table)
    if json_path is not None:
        write_json(report, json_path)


def _open_engine(
    engines: Path | None,
    random_weights: str | None,
    precision: str,
    executor: str,
    *,
    sessions: int,
    size: str,
    threads: int | None,
) -> StreamingEngine:
    """The engine of a bundle, or one of random weights."""
    if (engines is None) == (random_weights is None):
        raise OptionError("Give one of --engines BUNDLE and --random-weights SIZE.")
    if engines is not None:
        return StreamingEngine.load(engines, executor, max_sessions=sessions, threads=threads)
    # Needs torch and a GPU, which other benchmarks do without.
    from framesink.bench.random_engine import open_random_engine

    width, height = _parse_size(size)
    assert random_weights is not None
    return open_random_engine(
        random_weights, precision, sessions=sessions, frame_size=(height, width)
    )


def _measure_roofline(size: str | None, precision: str) -> RooflineReport:
    """The roofline at the sizes of the workload W720: 720 vision tokens a second, kept for 16 s."""
    from framesink.build.random_checkpoint import SIZES, write_random_description

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
    return measure_roofline(
        f"W720 on {size}",
        config.text,
        precision,
        context=13_312,
        prompt=748,
        sequences=(1, 8, 40),
    )


def _measure_server(
    engine: StreamingEngine,
    bundle: Path | None,
    video: Iterator[Chunk],
    *,
    executor: str,
    threads: int | None,
    **options: Any,
) -> "ServeReport":
    """Measure a server of the bundle, started for it, against the engine."""
    if bundle is None:
        raise OptionError("A server needs a bundle; give --engines BUNDLE.")
    try:
        from framesink.bench.serve import measure_serving, serving
    except ModuleNotFoundError as error:
        raise OptionError(
            f"A server needs the package {error.name}; install framesink[triton]."
        ) from error
    with serving(bundle, executor, threads) as client:
        return measure_serving(engine, client, video, **options)


def _parse_counts(value: str) -> list[int]:
    parts = value.split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,3}", part.strip()) for part in parts):
        raise OptionError(f"--streams {value!r} is not a list of numbers, such as 1,16,32.")
    return sorted({int(part) for part in parts})


def _parse_size(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", value)
    if match is None or "0" in match.groups():
        raise OptionError(f"--size {value!r} is not WIDTHxHEIGHT, such as 1280x720.")
    return int(match[1]), int(match[2])
