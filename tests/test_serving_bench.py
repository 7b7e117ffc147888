"""`framesink bench serve`: a server of its own, measured against the local runtime."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from framesink.cli.main import framesink

pytest.importorskip("pytriton", reason="nvidia-pytriton carries the server")
CLIP = Path(__file__).parents[1] / "demo" / "clip.mp4"


def test_both_roads_are_measured_against_the_local_runtime(
    demo_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "serve.json"
    arguments = ["bench", "serve", "--engines", demo_bundle, "--clip", CLIP, "--chunks", 6]
    arguments += ["--warmup", 2, "--threads", 1, "--vision-seconds", 4, "--json", output]
    result = CliRunner().invoke(framesink, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "first token, ensemble" in result.output
    report = json.loads(output.read_text())
    assert (report["benchmark"], report["chunks"], report["frame_format"]) == ("serve", 6, "jpeg")
    # The same chunks both ways: so differences are of the same replies.
    assert report["same_tokens"] == {"direct": 6, "ensemble": 6}
    for road in ("direct", "ensemble"):
        counts = {name: times["count"] for name, times in report["overhead"][road].items()}
        assert counts["first"] == counts["reply"] == 6
        assert 0 < counts["token"] <= 6
        assert report["roads"][road]["first"]["p50"] > 0


def test_a_server_needs_a_bundle() -> None:
    result = CliRunner().invoke(framesink, ["bench", "serve"])
    assert result.exit_code == 2
    assert "--engines BUNDLE" in result.stderr
