"""Files of results: what several runs add up to."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from framesink.bench import results, streams
from framesink.bench.chunk import ChunkReport, GpuTimes, _gpu_times
from framesink.bench.endurance import Checkpoint, EnduranceReport
from framesink.bench.environment import Environment
from framesink.bench.floors import ChunkFloor
from framesink.bench.measure import ChunkResult, Quantiles
from framesink.bench.memory import Memory
from framesink.bench.report import chunk_table
from framesink.bench.results import Run, add_result
from framesink.bench.roofline_report import RooflineReport
from framesink.bench.streams import StreamsReport
from framesink.bench.workload import describe_workload
from framesink.cli.main import framesink
from framesink.runtime.errors import OptionError
from framesink.runtime.policies import SinkWindow
from framesink.runtime.preprocess import Grid

RUN = Run("W720", "fp8", "framesink bench")


def times(milliseconds: float) -> Quantiles:
    return Quantiles(milliseconds / 1000, 2 * milliseconds / 1000, 9)


CHUNK = ChunkReport(
    executor="here",
    chunks=9,
    warmup=1,
    frame_size=(560, 1008),
    chunk=times(70.0),
    ttft=times(25.0),
    itl=times(2.5),
    gpu=GpuTimes(times(6.0), times(15.0), times(2.25)),
    floor=ChunkFloor(0.005, 0.0125, 0.002, 0.0175, 0.055),
    fps=20.0,
    realtime_factor=10.0,
    tokens_per_chunk=20.0,
    prompt_tokens=748.0,
    context_tokens=13_527,
    pages_used=850,
    pages_total=1024,
    resident=1 << 30,
)
STREAMS = StreamsReport("here", (560, 1008), 1.0, 13_527, 33, 31, True, (), Memory(1 << 30, None))
LOOKS = tuple(
    Checkpoint(chunk, Memory(0, None), 9, 9, 0.1, 0.01, step, 0.1, 0.1, {})
    for chunk, step in ((60, 0.1), (120, 0.101))
)
ENDURANCE = EnduranceReport("here", 32, (64, 64), 18, 99.0, LOOKS)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """What results are made on."""
    found = Environment("2026-11-22", "x86_64", "NVIDIA H200", {"torch": "2.11"})
    monkeypatch.setattr(results, "environment", lambda: found)
    return found


def test_workloads_of_a_roofline_and_of_endurance_are_their_own(
    tmp_path: Path, machine: Environment
) -> None:
    path = tmp_path / "w720.json"
    add_result(path, ENDURANCE, replace(RUN, workload="small frames"))
    assert kept(path)["workload"] == "small frames"
    add_result(path, CHUNK, RUN)
    assert kept(path)["workload"] == "W720"
    assert kept(path)["endurance"]["workload"] == "small frames"


def kept(path: Path) -> Any:
    return json.loads(path.read_text())


def test_runs_add_up(tmp_path: Path, machine: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w720.json"
    add_result(path, STREAMS, RUN)
    assert kept(path)["live_streams"] == 33
    assert kept(path)["chunk_ms_p50"] is None
    later = replace(machine, date="2026-11-23", versions={"torch": "2.12"})
    monkeypatch.setattr(results, "environment", lambda: later)
    add_result(path, CHUNK, replace(RUN, command="framesink bench chunk"))
    add_result(path, ENDURANCE, replace(RUN, workload="small frames"))
    content = kept(path)
    sections = {name: content.pop(name) for name in ("chunk", "streams", "endurance")}
    assert content == {
        "workload": "W720",
        "gpu": "NVIDIA H200",
        "precision": "fp8",
        "date": "2026-11-23",
        "versions": {"torch": "2.12"},
        "chunk_ms_p50": 70.0,
        "chunk_ms_p99": 140.0,
        "ttft_ms_p50": 25.0,
        "decode_step_ms_p50": 2.5,
        "decode_step_gpu_ms_p50": 2.25,
        "chunk_floor_ms": 55.0,
        "live_streams": 33,
        "endurance_step_ratio": 1.01,
    }
    assert sections["streams"]["date"] == "2026-11-22"
    assert sections["chunk"]["command"] == "framesink bench chunk"
    assert sections["chunk"]["gpu"]["decode_step"] == {"p50": 0.00225, "p99": 0.0045, "count": 9}
    assert sections["endurance"]["workload"] == "small frames"
    roofline = RooflineReport("7B", "fp8", 13_312, 4e12, {"fp8": 1e15}, (), (), CHUNK.floor, 52)
    add_result(path, roofline, replace(RUN, workload="7B"))
    assert kept(path)["live_streams_floor"] == 52
    assert kept(path)["workload"] == "W720"
    add_result(path, replace(CHUNK, chunk=times(60.0)), RUN)
    assert kept(path)["chunk_ms_p50"] == 60.0
    assert kept(path)["live_streams"] == 33


@pytest.mark.parametrize(
    ("run", "gpu", "what"),
    [
        (replace(RUN, workload="W360"), "NVIDIA H200", "another workload"),
        (replace(RUN, precision="int8"), "NVIDIA H200", "another precision"),
        (RUN, "NVIDIA H100", "another gpu"),
    ],
)
def test_other_things_are_not_mixed(
    tmp_path: Path,
    machine: Environment,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    gpu: str,
    what: str,
) -> None:
    path = tmp_path / "w720.json"
    add_result(path, CHUNK, RUN)
    before = path.read_text()
    monkeypatch.setattr(results, "environment", lambda: replace(machine, gpu=gpu))
    with pytest.raises(OptionError, match=what):
        add_result(path, STREAMS, run)
    assert path.read_text() == before


@pytest.mark.parametrize("content", ["", "[]", '{"chunk": 1}', "\udcff"])
def test_a_file_that_holds_no_results_is_left_alone(
    tmp_path: Path, machine: Environment, content: str
) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(OptionError, match="no file of results"):
        add_result(path, CHUNK, RUN)
    assert path.read_bytes() == content.encode("utf-8", "surrogateescape")


def test_several_benchmarks_in_one_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SETTLING", 1.0)
    path = tmp_path / "tiny.json"
    small = ["--size", "64x48", "--max-new-tokens", "4", "--threads", "1", "--chunks", "3"]
    counts = ["--warmup", "1", "--streams", "1,2", "--seconds", "1", "--results", str(path)]
    command = ["bench", "chunk", "streams", "--engines", str(tiny_bundle), *counts, *small]
    result = CliRunner().invoke(framesink, command)
    assert result.exit_code == 0, result.output
    content = kept(path)
    assert "2 frames of 64x48 every 1 s" in content["workload"]
    assert content["chunk_ms_p50"] == pytest.approx(1000 * content["chunk"]["chunk"]["p50"], 0.01)
    assert [found["streams"] for found in content["streams"]["results"]] == [1, 2]
    again = CliRunner().invoke(framesink, [*command, "--vision-seconds", "8"])
    assert again.exit_code == 2
    assert "another workload" in again.stderr


def test_gpu_times_are_those_between_chunks() -> None:
    def result(tokens: int) -> ChunkResult:
        return ChunkResult(0.1, 0.1, 2, 0.02, (), tuple(range(tokens)))

    worked = [
        {"vision": 1.0, "prefill": 1.0, "decode": 1.0, "busy": 3.0},
        {"vision": 1.006, "prefill": 1.014, "decode": 1.038, "busy": 3.058},
        {"vision": 1.016, "prefill": 1.030, "decode": 1.038, "busy": 3.084},
    ]
    found = _gpu_times(worked, [result(20), result(1)])
    assert found is not None
    assert found.vision.p50 == pytest.approx(0.008)
    assert found.prefill.p50 == pytest.approx(0.015)
    assert found.decode_step == Quantiles(pytest.approx(0.002), pytest.approx(0.002), 1)
    assert _gpu_times([{}, {}], [result(3)]) is None


def test_a_chunk_stands_beside_its_floor() -> None:
    table = chunk_table(CHUNK)
    cells = [list(column.cells) for column in table.columns]
    rows = {name: [column[i] for column in cells[1:]] for i, name in enumerate(cells[0])}
    assert rows["chunk"] == ["70.0 ms", "140.0 ms", "55.0 ms", "1.27×"]
    assert rows["GPU: prefill"] == ["15.0 ms", "30.0 ms", "12.5 ms", "1.20×"]
    assert rows["GPU: decode step"][3] == "1.12×"


def test_w720_is_known_by_its_name() -> None:
    def described(policy: SinkWindow) -> str:
        return describe_workload(
            policy,
            model="7B",
            frame_size=(560, 1008),
            frames=2,
            grid=Grid(1, 40, 72),
            merge_size=2,
            chunk_seconds=1.0,
            max_new_tokens=20,
        )

    w720 = SinkWindow(sink_text=512, recent_text=512, vision_seconds=16.0, reply_turns=16)
    assert described(w720).startswith("W720: a stream is 2 frames of 1008x560")
    assert described(replace(w720, recent_text=256)).startswith("a stream is")
