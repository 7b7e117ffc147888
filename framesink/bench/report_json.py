"""Benchmark reports as JSON."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from framesink.bench.chunk import ChunkReport
from framesink.bench.concurrency import ConcurrencyReport
from framesink.bench.endurance import EnduranceReport
from framesink.bench.environment import environment
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
    """Write a report and what it was measured on. Raises OutputError."""
    content = {"benchmark": name_of(report), "environment": asdict(environment())}
    write_object(content | as_json(report), path)


def as_json(report: Report) -> dict[str, Any]:
    """A report's figures, times in seconds and memory in bytes."""
    content: dict[str, Any] = _finite(asdict(report))
    if isinstance(report, EnduranceReport):
        content["growth"] = asdict(report.growth)
    return content


def name_of(report: Report) -> str:
    """The benchmark that makes such a report."""
    return type(report).__name__.removesuffix("Report").lower()


def write_object(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file. Raises OutputError."""
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


def _finite(value: Any) -> Any:
    """NaN, which JSON does not have, becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
