"""`framesink bench`: how fast, how long, how many."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from framesink.bench.precisions import PRECISIONS, Precisions
from framesink.bench.report_json import Report, require_writable, write_json
from framesink.bench.results import KEPT, Run, add_result, require_fitting
from framesink.cli.bench_runs import (
    Benchmark,
    BenchOptions,
    open_bench,
    run_benchmark,
    run_roofline,
)
from framesink.runtime.errors import OptionError

_COUNT = click.IntRange(min=1)
_PRECISION = click.Choice(PRECISIONS)


@click.command()
@click.argument("what", type=click.Choice(get_args(Benchmark)), nargs=-1)
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
    type=_PRECISION,
    default="fp8",
    show_default=True,
    help="Of the random weights' linear layers.",
)
@click.option("--vision-precision", type=_PRECISION, help="The vision encoder's; as the others.")
@click.option(
    "--head-precision",
    type=_PRECISION,
    default="bf16",
    show_default=True,
    help="Of the projection to the vocabulary.",
)
@click.option("--kv-precision", type=_PRECISION, default="bf16", show_default=True, help="Of K/V.")
@click.option("--clip", type=click.Path(path_type=Path), help="A video to measure with, looped.")
@click.option(
    "--size",
    default="448x448",
    show_default=True,
    metavar="WIDTHxHEIGHT",
    help="Size of generated frames, without --clip.",
)
@click.option("--chunks", type=_COUNT, help="Chunks to run: 60, endurance 3600, concurrency 20.")
@click.option(
    "--warmup",
    type=_COUNT,
    help="Chunks not counted: 18, concurrency 3, serve 10; endurance more, to fill its text.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    help="Of real time for each number of streams (20); endurance ends after so many.",
)
@click.option(
    "--sessions", type=_COUNT, default=16, show_default=True, help="concurrency and streams only."
)
@click.option(
    "--streams",
    metavar="N,N,…",
    help="Numbers of live streams to hold, by default 1 and --sessions; endurance: how many.",
)
@click.option(
    "--by-deadline/--in-turn",
    default=True,
    show_default=True,
    help="streams only: how steps are divided among them.",
)
@click.option("--find", is_flag=True, help="streams only: look for the most that can be held.")
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
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write one benchmark's figures."
)
@click.option(
    "--results",
    "results_path",
    type=click.Path(path_type=Path),
    help="Add the figures to a file of results, or begin one.",
)
def bench(
    what: tuple[Benchmark, ...],
    precision: Any,
    vision_precision: Any,
    head_precision: Any,
    kv_precision: Any,
    size: str,
    streams: str | None,
    json_path: Path | None,
    results_path: Path | None,
    **options: Any,
) -> None:
    """Measure a bundle on this machine, in one or more ways (WHAT; by default chunk).

    chunk: time per chunk of one session, on a GPU beside the least it could be. endurance: one
    session or --streams of them for very long, as fast as the machine goes, to see that nothing
    grows. concurrency: many sessions at once, each compared with itself alone. streams: how many
    live streams the machine holds, in real time, and where the time goes. serve: what a server adds
    to the time to the first token and to each further one. roofline: this GPU's memory and matrix
    rates at the sizes of a model of random weights, and the least time a step can take.
    """
    console = Console(highlight=False)
    benchmarks = what or ("chunk",)
    _check_outputs(benchmarks, json_path, results_path)
    settings = BenchOptions(
        precisions=Precisions(
            precision, head_precision, kv_precision, vision_precision or precision
        ),
        frame_size=_parse_size(size),
        counts=_parse_counts(streams) if streams else None,
        **options,
    )
    command = shlex.join(["framesink", *sys.argv[1:]])

    def tell(report: Report, table: Table, run: Run) -> None:
        console.print(table)
        if json_path is not None:
            write_json(report, json_path)
        if results_path is not None:
            add_result(results_path, report, run)

    if "roofline" in benchmarks:
        roofline, table = run_roofline(settings)
        tell(roofline, table, Run(roofline.workload, roofline.precision, command))
    others = [name for name in benchmarks if name != "roofline"]
    if others:
        with open_bench(settings, others) as opened:
            console.print(opened.engine.executor_reason, style="dim")
            run = Run(opened.workload, opened.precision, command)
            for name in others:
                if results_path is not None:
                    require_fitting(results_path, name, run)
                tell(*run_benchmark(name, opened, console), run)


def _check_outputs(
    benchmarks: tuple[Benchmark, ...], json_path: Path | None, results_path: Path | None
) -> None:
    """Raise OptionError for files that cannot hold all that is measured, OutputError for those that
    cannot be written."""
    if json_path is not None:
        if len(benchmarks) > 1:
            raise OptionError("--json holds the figures of one benchmark; give --results instead.")
        require_writable(json_path)
    if results_path is not None:
        if not KEPT.issuperset(benchmarks):
            raise OptionError(f"--results keeps {', '.join(sorted(KEPT))}; give --json instead.")
        require_writable(results_path)


def _parse_counts(value: str) -> list[int]:
    parts = value.split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,3}", part.strip()) for part in parts):
        raise OptionError(f"--streams {value!r} is not a list of numbers, such as 1,16,32.")
    return sorted({int(part) for part in parts})


def _parse_size(value: str) -> tuple[int, int]:
    """Height and width."""
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", value)
    if match is None or "0" in match.groups():
        raise OptionError(f"--size {value!r} is not WIDTHxHEIGHT, such as 1280x720.")
    return int(match[2]), int(match[1])
