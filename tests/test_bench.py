"""The benchmarks measure what they say, on a tiny bundle."""

import json
import math
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from framesink.bench import endurance, streams
from framesink.bench.endurance import Checkpoint, EnduranceReport
from framesink.bench.input import clip_chunks, generated_chunks, repeated
from framesink.bench.measure import Quantiles
from framesink.bench.memory import GpuMemory, Memory
from framesink.bench.streams import StreamsResult
from framesink.bench.time_shares import time_shares
from framesink.cli.main import framesink
from framesink.runtime.errors import VideoError

SMALL = ["--size", "64x48", "--max-new-tokens", "4", "--threads", "1"]


def test_generated_chunks_differ_and_repeat_with_the_seed() -> None:
    first = list(islice(generated_chunks(48, 64, 2.0, 1.0, seed=3), 4))
    again = list(islice(generated_chunks(48, 64, 2.0, 1.0, seed=3), 4))
    other = next(generated_chunks(48, 64, 2.0, 1.0, seed=4))
    assert [(chunk.t0, chunk.t1) for chunk in first] == [(float(i), i + 1.0) for i in range(4)]
    frames = np.concatenate([chunk.frames for chunk in first])
    assert frames.shape == (8, 48, 64, 3)
    assert all((a != b).any() for a, b in pairwise(frames))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.frames, two.frames)
    assert (other.frames != first[0].frames).any()
    again = list(islice(repeated(generated_chunks(48, 64, 2.0, 1.0, seed=3)), 9))
    for number, chunk in enumerate(again):
        np.testing.assert_array_equal(chunk.frames, first[number % 4].frames)


def test_a_clip_goes_on_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48))
    for level in range(25):
        writer.write(np.full((48, 64, 3), 10 * level, np.uint8))
    writer.release()
    chunks = list(islice(clip_chunks(path, 2.0, 1.0), 7))
    assert [chunk.t0 for chunk in chunks] == [float(i) for i in range(7)]
    assert all(a < b for c in chunks for a, b in zip(c.timestamps, c.timestamps[1:], strict=False))
    np.testing.assert_array_equal(chunks[0].frames, chunks[3].frames)
    with pytest.raises(VideoError, match="cannot be found"):
        next(clip_chunks(tmp_path / "missing.avi", 2.0, 1.0))


def test_quantiles() -> None:
    assert Quantiles.of([float(i) for i in range(1, 101)]) == Quantiles(50.5, 99.01, 100)
    assert math.isnan(Quantiles.of([]).p50)


def test_growth_is_that_of_the_last_minute_since_the_first() -> None:
    def look(chunk: int, factor: float, resident: int, reserved: int) -> Checkpoint:
        memory = Memory(resident, GpuMemory(7, reserved, reserved + 5, 3 + chunk // 120))
        times = {"itl": 0.003, "step_seconds": 0.004, "seconds_each": 0.05, "cpu_seconds": 0.2}
        gpu = {"decode": 0.03 * factor, "busy": 0.05}
        return Checkpoint(
            chunk,
            memory,
            pages_used=100 + chunk,
            context_tokens=500,
            chunk_seconds=0.1 * factor,
            gpu_seconds=gpu,
            **{name: value * factor for name, value in times.items()},
        )

    looks = (look(60, 1.0, 1000, 50), look(120, 9.0, 9, 9), look(180, 1.5, 1010, 50))
    growth = EnduranceReport("here", 2, (48, 64), 18, 99.0, looks).growth
    assert (growth.since, growth.pages) == (60, 120)
    assert growth.memory == Memory(10, GpuMemory(0, 0, 0, 1))
    assert growth.gpu_ratio == pytest.approx({"decode": 1.5, "busy": 1.0})
    for name in ("chunk", "itl", "step", "seconds", "cpu"):
        assert getattr(growth, f"{name}_ratio") == pytest.approx(1.5)


def test_every_moment_of_a_second_is_in_one_share() -> None:
    # From 10 s to 20 s: steps for 3 s, vision for 1.5 s of which 0.5 beside them, so that the GPU
    # works 4 s; chunks wait from 11 to 15 and from 14 to 17, and one from before to 10.5.
    before = {"decode": 1.0, "prefill": 0.5, "vision": 0.25, "busy": 1.5}
    after = {"decode": 3.0, "prefill": 1.5, "vision": 1.75, "busy": 5.5}
    waits = [(9.0, 10.5), (11.0, 15.0), (14.0, 17.0), (19.0, 19.0), (3.0, 4.0)]
    shares = time_shares(before, after, waits, (10.0, 20.0))
    assert shares is not None
    assert shares.steps == pytest.approx({"decode": 0.2, "prefill": 0.1})
    assert shares.vision == pytest.approx(0.1)
    assert shares.vision_beside == pytest.approx(0.05)
    assert shares.host == pytest.approx(0.25)
    assert shares.idle == pytest.approx(0.35)
    whole = sum(shares.steps.values()) + shares.vision + shares.host + shares.idle
    assert whole == pytest.approx(1.0)
    assert time_shares({}, {}, waits, (10.0, 20.0)) is None
    late = time_shares({"busy": 0.0}, {"decode": 10.5, "busy": 10.5}, [(0.0, 30.0)], (10.0, 20.0))
    assert late is not None
    assert (late.host, late.idle) == (0.0, 0.0)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(framesink, ["bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_chunk(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "chunk.json"
    output = run("--engines", tiny_bundle, "--chunks", 5, "--warmup", 2, "--json", path, *SMALL)
    assert "One session, 5 chunks of 64×48 after 2 to warm up" in output
    figures = json.loads(path.read_text())
    assert figures["benchmark"] == "chunk"
    assert figures["chunk"]["count"] == figures["ttft"]["count"] == 5
    assert figures["gpu"] is figures["floor"] is None
    assert figures["prompt_tokens"] > 4
    assert 0 < figures["ttft"]["p50"] <= figures["chunk"]["p50"] <= figures["chunk"]["p99"]
    assert figures["fps"] == pytest.approx(2 * figures["realtime_factor"])
    assert 0 < figures["pages_used"] < figures["pages_total"]
    assert 1 <= figures["tokens_per_chunk"] <= 4


@pytest.mark.parametrize("streams", [1, 3])
def test_endurance(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    monkeypatch.setattr(endurance, "MINUTE", 8)
    path = tmp_path / "endurance.json"
    windows = ["--sink-text", 8, "--recent-text", 8, "--vision-seconds", 4]
    options = ["--chunks", 25, "--warmup", 20, "--streams", streams, "--json", path]
    output = run("endurance", "--engines", tiny_bundle, *options, *windows, *SMALL)
    assert "since 8" in output
    figures = json.loads(path.read_text())
    assert figures["streams"] == streams
    points = figures["checkpoints"]
    assert [point["chunk"] for point in points] == [8, 16, 24]
    for point in points:
        assert 0 < point["itl"] < point["chunk_seconds"]
        assert 0 < point["step_seconds"] < point["chunk_seconds"]
        assert point["memory"]["resident"] > 1 << 20
        assert point["gpu_seconds"] == {}
    tokens = [point["context_tokens"] for point in points]
    assert max(tokens) - min(tokens) < 80
    assert abs(figures["growth"]["pages"]) <= 8 * streams


def test_endurance_ends_when_its_time_is_over(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endurance, "MINUTE", 2)
    seconds = iter(range(1000))
    clock = SimpleNamespace(
        monotonic=lambda: float(next(seconds)), process_time=lambda: float(next(seconds))
    )
    monkeypatch.setattr(endurance, "time", clock)
    path = tmp_path / "endurance.json"
    options = ["--chunks", 1000, "--recent-text", 6, "--seconds", 90, "--json", path]
    run("endurance", "--engines", tiny_bundle, *options, *SMALL)
    # Two replies of four tokens fill the recent text.
    assert json.loads(path.read_text())["warmup"] == 18 + 2
    assert 4 <= json.loads(path.read_text())["checkpoints"][-1]["chunk"] < 1000


def test_concurrency(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "concurrency.json"
    options = ["--sessions", 4, "--chunks", 3, "--warmup", 1, "--json", path]
    output = run("concurrency", "--engines", tiny_bundle, *options, *SMALL)
    assert "4 of 4" in output
    figures = json.loads(path.read_text())
    assert figures["same_tokens"] == 4
    assert figures["chunk"]["count"] == 12
    assert figures["pages_peak"] > 0


def test_streams(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SETTLING", 1.0)
    path = tmp_path / "streams.json"
    options = ["--streams", "3,1", "--seconds", 2, "--warmup", 1, "--json", path]
    run("streams", "--engines", tiny_bundle, *options, *SMALL)
    figures = json.loads(path.read_text())
    assert [result["streams"] for result in figures["results"]] == [1, 3]
    for result in figures["results"]:
        # however slow the machine is: a chunk is answered, or was refused
        assert 0 <= 2 * result["streams"] - result["counted"] <= result["refused"]
        assert result["chunk"]["count"] == result["counted"]
        assert result["shares"] is None
    assert figures["by_deadline"]
    assert figures["environment"]["versions"].keys() >= {"framesink", "numpy"}


@pytest.mark.parametrize("most", range(9))
def test_the_most_streams_that_can_be_held_are_found(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path, most: int
) -> None:
    tried = []

    def hold(engine: object, held: list, length: float, seconds: float) -> StreamsResult:
        assert seconds == 20.0
        tried.append(len(held))
        late = 0.5 if len(held) <= most else 1.5
        times = Quantiles(0.4, late * length, 100)
        memory = Memory(0, None)
        return StreamsResult(len(held), seconds, 9, times, times, times, 0, 1.0, None, memory, None)

    monkeypatch.setattr(streams, "_hold", hold)
    path = tmp_path / "streams.json"
    options = ["--streams", "2,8", "--find", "--warmup", 1, "--json", path]
    run("streams", "--engines", tiny_bundle, *options, *SMALL)
    assert tried[:2] == [2, 8]
    assert len(set(tried)) == len(tried) <= 5
    assert json.loads(path.read_text())["live_streams"] == most


@pytest.mark.parametrize(
    ("refused", "p99", "live"), [(0, 0.99, True), (1, 0.5, False), (0, 1.0, False)]
)
def test_a_stream_is_live_if_replies_are_in_time(refused: int, p99: float, live: bool) -> None:
    times = Quantiles(0.4, p99, 100)
    memory = Memory(0, None)
    result = StreamsResult(4, 25.0, 100, times, times, times, refused, 2.0, None, memory, None)
    assert result.is_live(1.0) is live


def test_random_weights_need_a_size_and_no_bundle(tiny_bundle: Path) -> None:
    for arguments in ([], ["--engines", str(tiny_bundle), "--random-weights", "7b"]):
        result = CliRunner().invoke(framesink, ["bench", *arguments])
        assert result.exit_code == 2
        assert "--random-weights" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--size", "0x4"], 2, "WIDTHxHEIGHT"),
        (["streams", "--streams", "2,x"], 2, "list of numbers"),
        (["endurance", "--chunks", 100], 2, "too few"),
        (["endurance", "--streams", "2,3"], 2, "one number"),
        (["chunk", "streams", "--json", "x"], 2, "--results"),
        (["concurrency", "--results", "x"], 2, "keeps chunk, endurance, roofline, streams"),
        (["--json", "/dev/null/x"], 9, "cannot be written"),
        (["concurrency", "--sessions", 40], 6, "sessions"),
        (["--clip", "missing.mp4"], 5, "cannot be found"),
    ],
)
def test_refusals(tiny_bundle: Path, arguments: list, code: int, sentence: str) -> None:
    result = CliRunner().invoke(
        framesink, ["bench", "--engines", str(tiny_bundle), *map(str, arguments)]
    )
    assert result.exit_code == code
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentence in line
