"""Benchmark reports as tables."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from framesink.bench.chunk import ChunkReport
from framesink.bench.concurrency import ConcurrencyReport
from framesink.bench.endurance import Checkpoint, EnduranceReport
from framesink.bench.floors import ChunkFloor
from framesink.bench.measure import Quantiles
from framesink.bench.memory import Memory
from framesink.bench.power import GpuPower
from framesink.bench.streams import StreamsReport

if TYPE_CHECKING:  # it needs the client's packages, which no other benchmark does
    from framesink.bench.serve import ServeReport

# Minutes of a long run that are shown; its JSON has all.
_SHOWN = 4


def chunk_table(report: ChunkReport) -> Table:
    """Time per chunk; on a GPU beside the least it could be."""
    height, width = report.frame_size
    rows = [("chunk", report.chunk), ("TTFT", report.ttft), ("ITL", report.itl)]
    if report.gpu is not None:
        rows += [
            ("GPU: vision encoder", report.gpu.vision),
            ("GPU: prefill", report.gpu.prefill),
            ("GPU: decode step", report.gpu.decode_step),
        ]
    title = (
        f"One session, {report.chunks} chunks of {width}×{height} after {report.warmup} to warm up"
    )
    if report.floor is None:
        table = _time_table(title, rows)
    else:
        table = _floor_table(title, rows, report.floor)
    table.add_row("frames per second", f"{report.fps:.1f}", "")
    table.add_row("real-time factor", f"{report.realtime_factor:.2f}×", "")
    table.add_row("tokens per reply", f"{report.tokens_per_chunk:.1f}", "")
    table.add_row("tokens of a prompt", f"{report.prompt_tokens:.1f}", "")
    table.add_row("context, tokens", f"{report.context_tokens:,}", "")
    table.add_row("KV pages in use", f"{report.pages_used} of {report.pages_total}", "")
    table.add_row("resident memory", _mebibytes(report.resident), "")
    return table


def concurrency_table(report: ConcurrencyReport) -> Table:
    """Many sessions."""
    table = _time_table(
        f"{report.sessions} sessions at once, {report.chunks} chunks each",
        (("chunk", report.chunk), ("TTFT", report.ttft), ("ITL", report.itl)),
    )
    speedup = report.alone_seconds / report.together_seconds
    table.add_row("frames per second, all", f"{report.fps:.1f}", "")
    table.add_row("one after another", f"{report.alone_seconds:.2f} s", "")
    table.add_row("together", f"{report.together_seconds:.2f} s", f"{speedup:.2f}× faster")
    table.add_row("sequences per step", f"{report.mean_batch:.1f}", "")
    table.add_row("same tokens as alone", f"{report.same_tokens} of {report.sessions}", "")
    table.add_row("KV pages, most", f"{report.pages_peak} of {report.pages_total}", "")
    table.add_row("resident memory", _mebibytes(report.resident), "")
    return table


def endurance_table(report: EnduranceReport) -> Table:
    """Minutes spread evenly over the run, side by side, and what grew from the first to the
    last."""
    height, width = report.frame_size
    looks, growth = _spread(report.checkpoints), report.growth
    table = _titled(
        f"Streams: {report.streams} of {width}×{height}, {looks[-1].chunk:,} chunks each in "
        f"{report.seconds:.0f} s (times: of the last {looks[0].chunk} chunks)"
    )
    table.add_column("after chunk")
    for look in looks:
        table.add_column(f"{look.chunk:,}", justify="right")
    table.add_column(f"since {growth.since}", justify="right")

    def add(name: str, values: list[float], ratio: float) -> None:
        table.add_row(name, *map(_milliseconds, values), f"{ratio:.3f}×")

    add("chunk, p50", [look.chunk_seconds for look in looks], growth.chunk_ratio)
    add("ITL, p50", [look.itl for look in looks], growth.itl_ratio)
    add("a step", [look.step_seconds for look in looks], growth.step_ratio)
    add("per chunk", [look.seconds_each for look in looks], growth.seconds_ratio)
    add("  processor", [look.cpu_seconds for look in looks], growth.cpu_ratio)
    for name, ratio in growth.gpu_ratio.items():
        add(f"  GPU, {name}", [look.gpu_seconds.get(name, 0.0) for look in looks], ratio)
    table.add_section()
    for name, sizes, more in _memory_rows([look.memory for look in looks], growth.memory):
        table.add_row(name, *(f"{size / 2**20:,.1f}" for size in sizes), f"{more / 2**20:+.1f}")
    if growth.memory.gpu is not None:
        counts = [look.memory.gpu.device_allocations for look in looks if look.memory.gpu]
        more = growth.memory.gpu.device_allocations
        table.add_row("GPU allocations", *(f"{count:,}" for count in counts), f"{more:+d}")
    table.add_row("KV pages", *(f"{look.pages_used:,}" for look in looks), f"{growth.pages:+d}")
    table.add_row("context, tokens", *(f"{look.context_tokens:,}" for look in looks), "")
    return table


def serve_table(report: "ServeReport") -> Table:
    """Server against local runtime."""
    height, width = report.frame_size
    rows = []
    labels = {"first": "first token", "token": "per further token", "reply": "whole reply"}
    for name, label in labels.items():
        rows.append((f"{label}, local", getattr(report.local, name)))
        for road in report.roads:
            rows.append((f"{label}, {road}", getattr(report.roads[road], name)))
            rows.append(("    over local", getattr(report.overhead[road], name)))
    table = _time_table(
        f"Server and local runtime, {report.chunks} chunks of {width}×{height} as "
        f"{report.frame_format} after {report.warmup} to warm up",
        rows,
    )
    for road, same in report.same_tokens.items():
        table.add_row(f"same tokens, {road}", f"{same} of {report.chunks}", "")
    return table


def streams_table(report: StreamsReport) -> Table:
    """Live streams, a row for each number of them. On a GPU behind it where the time went, and in
    brackets how long the vision encoder ran beside steps, then its power and clock."""
    height, width = report.frame_size
    table = _titled(
        f"Live streams of {width}×{height}, a chunk every {report.chunk_seconds:g} s, "
        f"{report.context_tokens:,} tokens of context: {report.live_streams} hold"
        + ("" if report.admitted is None else f", {report.admitted} would be let in")
    )
    shares = [result.shares for result in report.results if result.shares is not None]
    kinds = sorted({name for share in shares for name in share.steps})
    parts = [*kinds, "vision", "host", "idle", "(beside)"] if shares else []
    powers = [result.power for result in report.results if result.power is not None]
    if powers:
        parts += ["power", "clock"]
        limit, highest = powers[0].limit, powers[0].highest
        table.caption = f"GPU: at most {limit:.0f} W and {highest / 1e9:.2f} GHz"
    for name in ("streams", "chunk p50", "p99", "TTFT p50", "ITL p50", "batch", "late", *parts):
        table.add_column(name, justify="right")
    for result in report.results:
        share = result.shares
        table.add_row(
            str(result.streams),
            f"{1000 * result.chunk.p50:.0f} ms",
            f"{1000 * result.chunk.p99:.0f} ms",
            _milliseconds(result.ttft.p50),
            _milliseconds(result.itl.p50),
            f"{result.mean_batch:.1f}",
            str(result.refused),
            *([] if share is None else (_percent(share.steps.get(name, 0.0)) for name in kinds)),
            *(
                []
                if share is None
                else map(_percent, (share.vision, share.host, share.idle, share.vision_beside))
            ),
            *_power_cells(result.power),
        )
    return table


def _power_cells(power: GpuPower | None) -> list[str]:
    """What was drawn, and the clock."""
    return [] if power is None else [f"{power.watts:.0f} W", f"{power.clock / 1e9:.2f} GHz"]


def _time_table(title: str, rows: Sequence[tuple[str, Quantiles]]) -> Table:
    table = _titled(title)
    table.add_column("", min_width=24)
    table.add_column("p50", justify="right")
    table.add_column("p99", justify="right")
    for name, quantiles in rows:
        table.add_row(name, _milliseconds(quantiles.p50), _milliseconds(quantiles.p99))
    table.add_section()
    return table


def _floor_table(title: str, rows: Sequence[tuple[str, Quantiles]], floor: ChunkFloor) -> Table:
    """Rows of `chunk_table`, each beside its floor."""
    decode = floor.decode_step
    floors = (floor.chunk, floor.ttft, decode, floor.vision, floor.prefill, decode)
    table = _time_table(title, [])
    table.add_column("floor", justify="right")
    table.add_column("of the floor", justify="right")
    for (name, quantiles), least in zip(rows, floors, strict=True):
        table.add_row(
            name,
            _milliseconds(quantiles.p50),
            _milliseconds(quantiles.p99),
            _milliseconds(least),
            f"{quantiles.p50 / least:.2f}×",
        )
    table.add_section()
    return table


def _titled(title: str) -> Table:
    return Table(title=title, title_justify="left", min_width=len(title) + 2)


def _milliseconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds * 1000:.1f} ms"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _memory_rows(held: list[Memory], growth: Memory) -> list[tuple[str, list[int], int]]:
    """What, how many bytes of it, and how many more."""
    rows = [("host, MiB", [memory.resident for memory in held], growth.resident)]
    if growth.gpu is not None:
        gpus = [memory.gpu for memory in held if memory.gpu is not None]
        for name in ("used", "reserved", "allocated"):
            sizes = [getattr(gpu, name) for gpu in gpus]
            rows.append((f"GPU {name}, MiB", sizes, getattr(growth.gpu, name)))
    return rows


def _spread(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """A few of them, the first and the last among them."""
    last = len(checkpoints) - 1
    return [checkpoints[i] for i in sorted({round(last * n / (_SHOWN - 1)) for n in range(_SHOWN)})]
