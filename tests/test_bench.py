"""The benchmarks measure what they say, on a tiny bundle."""

import json
import math
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from framesink.bench import endurance, streams
from framesink.bench.endurance import Checkpoint, EnduranceReport, checkpoint_chunks
from framesink.bench.input import clip_chunks, generated_chunks
from framesink.bench.measure import Quantiles
from framesink.bench.streams import StreamsResult
from framesink.cli.main import framesink
from framesink.runtime.errors import OptionError, VideoError

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


@pytest.mark.parametrize("chunks", [101, 105, 400, 3600])
def test_checkpoints_begin_at_100_and_end_at_the_end(chunks: int) -> None:
    looks = checkpoint_chunks(chunks)
    assert (looks[0], looks[-1]) == (100, chunks)
    assert looks == sorted(set(looks))
    with pytest.raises(OptionError, match="too few"):
        checkpoint_chunks(100)


def test_growth_is_told_from_chunk_100_and_from_full_windows() -> None:
    points = [(100, 50.0, 10, 500), (200, 60.0, 20, 990), (300, 61.0, 21, 1000)]
    report = EnduranceReport(
        "here",
        tuple(
            Checkpoint(chunk, int(memory), pages, tokens, memory, cpu_seconds=2 * memory, itl=2.0)
            for chunk, memory, pages, tokens in points
        ),
    )
    growth, full = report.growth, report.full_growth
    assert (growth.since, growth.resident, growth.pages) == (100, 11, 11)
    assert (full.since, full.resident, full.pages) == (200, 1, 1)
    assert growth.chunk_ratio == pytest.approx(61 / 50)
    assert growth.cpu_ratio == pytest.approx(61 / 50)
    assert full.itl_ratio == 1.0


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
    assert 0 < figures["ttft"]["p50"] <= figures["chunk"]["p50"] <= figures["chunk"]["p99"]
    assert figures["fps"] == pytest.approx(2 * figures["realtime_factor"])
    assert 0 < figures["pages_used"] < figures["pages_total"]
    assert 1 <= figures["tokens_per_chunk"] <= 4


def test_endurance(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endurance, "BASELINE_CHUNK", 20)
    path = tmp_path / "endurance.json"
    windows = ["--sink-text", 8, "--recent-text", 8, "--vision-seconds", 4]
    output = run(
        "endurance", "--engines", tiny_bundle, "--chunks", 60, "--json", path, *windows, *SMALL
    )
    assert "since 20" in output
    figures = json.loads(path.read_text())
    assert [point["chunk"] for point in figures["checkpoints"]] == list(range(20, 61, 4))
    tokens = [point["context_tokens"] for point in figures["checkpoints"]]
    assert max(tokens) - min(tokens) < 80
    assert abs(figures["growth"]["pages"]) <= 8


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
    options = ["--streams", "3,1", "--chunks", 2, "--warmup", 1, "--json", path]
    run("streams", "--engines", tiny_bundle, *options, *SMALL)
    figures = json.loads(path.read_text())
    assert [result["streams"] for result in figures["results"]] == [1, 3]
    for result in figures["results"]:
        # however slow the machine is: a chunk is answered, or was refused
        assert 0 <= 2 * result["streams"] - result["counted"] <= result["refused"]
        assert result["chunk"]["count"] == result["counted"]
    assert figures["environment"]["versions"].keys() >= {"framesink", "numpy"}


@pytest.mark.parametrize(
    ("refused", "p99", "live"), [(0, 0.99, True), (1, 0.5, False), (0, 1.0, False)]
)
def test_a_stream_is_live_if_replies_are_in_time(refused: int, p99: float, live: bool) -> None:
    times = Quantiles(0.4, p99, 100)
    result = StreamsResult(4, 25.0, 100, times, times, times, refused, 2.0, {})
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
