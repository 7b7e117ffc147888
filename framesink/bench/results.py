"""Results that are kept: one file per workload, GPU and precision, to which several runs add."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framesink.bench.environment import environment
from framesink.bench.report_json import Report, as_json, name_of, write_object
from framesink.runtime.errors import OptionError

_MAX_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured: `workload` and `precision` in words, `command` as it was typed."""

    workload: str
    precision: str
    command: str


def add_result(path: Path, report: Report, run: Run) -> None:
    """Add a report of one of the benchmarks `KEPT` to a file, in place of an earlier one of it.

    The file says what it is about (`workload`, `gpu`, `precision`) and holds, under each
    benchmark's name, its whole report in seconds and bytes, with the `command`, `workload`, `date`
    and `versions` of that run. At its top are the figures that are compared most, in milliseconds,
    and the latest run's date and versions. Raises what `require_fitting` raises, OutputError for a
    file that cannot be written.
    """
    machine, name = environment(), name_of(report)
    kept = require_fitting(path, name, run)
    sections: dict[str, Any] = {key: kept[key] for key in _FIGURES if key in kept}
    sections[name] = {
        "command": run.command,
        "workload": run.workload,
        "date": machine.date,
        "versions": machine.versions,
        **as_json(report),
    }
    workloads = [sections[key]["workload"] for key in sections if key in _SHARING]
    content = {
        "workload": workloads[0] if workloads else run.workload,
        "gpu": machine.gpu,
        "precision": run.precision,
        "date": machine.date,
        "versions": machine.versions,
        **dict.fromkeys(_COMPARED),
    }
    for key in _FIGURES:
        if key in sections:
            content |= _FIGURES[key](sections[key])
    write_object(content | sections, path)


def require_fitting(path: Path, benchmark: str, run: Run) -> dict[str, Any]:
    """What a file holds, to which a run's report is to be added; nothing if there is none yet.

    Endurance and roofline may have a workload of their own. Raises OptionError for a file of
    another GPU, precision or workload, and one that is no such file.
    """
    kept = _read(path) if path.exists() else {}
    about = {"gpu": environment().gpu, "precision": run.precision}
    if benchmark in _SHARING and not _SHARING.isdisjoint(kept):
        about["workload"] = run.workload
    for key, value in about.items():
        if kept.get(key, value) != value:
            raise OptionError(f"{path} holds results of another {key}; give another file.")
    return kept


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} is no file of results ({error}); give another.") from error
    if not isinstance(content, dict) or not content.keys() >= {"workload", "gpu", "precision"}:
        raise OptionError(f"{path} is no file of results; give another.")
    return content


def _chunk_figures(section: Mapping[str, Any]) -> dict[str, Any]:
    figures = {
        "chunk_ms_p50": _milliseconds(section["chunk"]["p50"]),
        "chunk_ms_p99": _milliseconds(section["chunk"]["p99"]),
        "ttft_ms_p50": _milliseconds(section["ttft"]["p50"]),
        "decode_step_ms_p50": _milliseconds(section["itl"]["p50"]),
    }
    if section["gpu"] is not None:
        figures["decode_step_gpu_ms_p50"] = _milliseconds(section["gpu"]["decode_step"]["p50"])
    if section["floor"] is not None:
        figures["chunk_floor_ms"] = _milliseconds(section["floor"]["chunk"])
    return figures


def _streams_figures(section: Mapping[str, Any]) -> dict[str, Any]:
    return {"live_streams": section["live_streams"]}


def _endurance_figures(section: Mapping[str, Any]) -> dict[str, Any]:
    return {"endurance_step_ratio": round(section["growth"]["step_ratio"], 3)}


def _roofline_figures(section: Mapping[str, Any]) -> dict[str, Any]:
    return {"live_streams_floor": section["live_streams"]}


# What is compared most, by benchmark, from its section of the file.
_FIGURES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "chunk": _chunk_figures,
    "streams": _streams_figures,
    "endurance": _endurance_figures,
    "roofline": _roofline_figures,
}


KEPT = frozenset(_FIGURES)
# They are in every file, as null if not measured.
_COMPARED = ("chunk_ms_p50", "ttft_ms_p50", "decode_step_ms_p50", "live_streams")
# Those of one workload, the file's.
_SHARING = frozenset({"chunk", "streams"})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
