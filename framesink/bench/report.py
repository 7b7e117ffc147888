"""Benchmark reports as tables and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.table import Table

from framesink.bench.chunk import ChunkReport
from framesink.bench.concurrency import ConcurrencyReport
from framesink.bench.endurance import EnduranceReport
from framesink.bench.environment import environment
from framesink.bench.measure import Quantiles
from framesink.bench.roofline_report import RooflineReport
from framesink.bench.streams import StreamsReport
from framesink.runtime.errors import OutputError

if TYPE_CHECKING:  # it needs the client's packages, which no other benchmark does
    from framesink.bench.serve import ServeReport

Report: TypeAlias = (
    "ChunkReport | EnduranceReport | ConcurrencyReport | RooflineReport | ServeReport | "
    "StreamsReport"
)


def write_json(report: Report, path: Path) -> None:
    """Write a report, times in seconds and memory in bytes. Raises OutputError."""
    name = type(report).__name__.removesuffix("Report").lower()
    content: dict[str, Any] = {
        "benchmark": name,
        "environment": asdict(environment()),
        **_finite(asdict(report)),
    }
    if isinstance(report, EnduranceReport):
        content |= {"growth": asdict(report.growth), "full_growth": asdict(report.full_growth)}
    try:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise _refusal(path, error) from error


def require_writable(path: Path) -> None:
    """Raise OutputError if a report could not be written; an hour's work should not be lost."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise _refusal(path, error) from error
    if not existed:
        path.unlink()


def _refusal(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"The report cannot be written to {path} ({error.strerror}); give another file."
    )


def chunk_table(report: ChunkReport) -> Table:
    """Time per chunk."""
    height, width = report.frame_size
    table = _time_table(
        f"One session, {report.chunks} chunks of {width}×{height} after {report.warmup} to warm up",
        (("chunk", report.chunk), ("TTFT", report.ttft), ("ITL", report.itl)),
    )
    table.add_row("frames per second", f"{report.fps:.1f}", "")
    table.add_row("real-time factor", f"{report.realtime_factor:.2f}×", "")
    table.add_row("tokens per chunk", f"{report.tokens_per_chunk:.1f}", "")
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
    """Every checkpoint, and what grew between the first and the last."""
    table = _titled(
        "One session without an end (times: p50 of the last 100 chunks; CPU: of the process)"
    )
    for name in ("after", "resident", "KV pages", "context, tokens", "chunk", "CPU", "ITL"):
        table.add_column(name, justify="right")
    for checkpoint in report.checkpoints:
        table.add_row(
            f"{checkpoint.chunk:,}",
            _mebibytes(checkpoint.resident),
            str(checkpoint.pages_used),
            f"{checkpoint.context_tokens:,}",
            _milliseconds(checkpoint.chunk_seconds),
            _milliseconds(checkpoint.cpu_seconds),
            _milliseconds(checkpoint.itl),
        )
    table.add_section()
    for growth in dict.fromkeys((report.growth, report.full_growth)):
        table.add_row(
            f"since {growth.since:,}",
            f"{growth.resident / 2**20:+.1f} MiB",
            f"{growth.pages:+d}",
            "",
            f"{growth.chunk_ratio:.2f}×",
            f"{growth.cpu_ratio:.2f}×",
            f"{growth.itl_ratio:.2f}×",
        )
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
    """Live streams, a row for each number of them."""
    height, width = report.frame_size
    table = _titled(
        f"Live streams of {width}×{height}, a chunk every {report.chunk_seconds:g} s, "
        f"{report.context_tokens:,} tokens of context: {report.live_streams} hold"
    )
    kinds = sorted({name for result in report.results for name in result.gpu_shares})
    for name in ("streams", "chunk p50", "p99", "TTFT p50", "ITL p50", "batch", "late", *kinds):
        table.add_column(name, justify="right")
    for result in report.results:
        table.add_row(
            str(result.streams),
            _milliseconds(result.chunk.p50),
            _milliseconds(result.chunk.p99),
            _milliseconds(result.ttft.p50),
            _milliseconds(result.itl.p50),
            f"{result.mean_batch:.1f}",
            str(result.refused),
            *(f"{100 * result.gpu_shares.get(name, 0.0):.0f} %" for name in kinds),
        )
    return table


def _time_table(title: str, rows: Sequence[tuple[str, Quantiles]]) -> Table:
    table = _titled(title)
    table.add_column("", min_width=24)
    table.add_column("p50", justify="right")
    table.add_column("p99", justify="right")
    for name, quantiles in rows:
        table.add_row(name, _milliseconds(quantiles.p50), _milliseconds(quantiles.p99))
    table.add_section()
    return table


def _titled(title: str) -> Table:
    return Table(title=title, title_justify="left", min_width=len(title) + 2)


def _milliseconds(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds * 1000:.1f} ms"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _finite(value: Any) -> Any:
    """NaN, which JSON does not have, becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
