"""What is drawn of files of results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from framesink.bench.figures import read_figures

CONTENT = {
    "gpu": "NVIDIA H200",
    "precision": "fp8 linear layers, bf16 head, bf16 K/V, fp8 vision encoder",
    "live_streams": 34,
    "chunk": {
        "tokens_per_chunk": 20.0,
        "chunk": {"p50": 0.066},
        "gpu": {"vision": {"p50": 0.006}, "prefill": {"p50": 0.015}, "decode_step": {"p50": 0.002}},
        "floor": {"vision": 0.004, "prefill": 0.012, "decode_step": 0.0018},
    },
}


def written(directory: Path, content: object) -> Path:
    path = directory / "w720-h200-fp8.json"
    path.write_text(json.dumps(content))
    return path


def test_a_chunk_is_split_into_what_the_gpu_does_and_the_rest(tmp_path: Path) -> None:
    found = read_figures(written(tmp_path, CONTENT))
    assert found is not None
    parts = found.chunk
    assert [parts.vision, parts.prefill, parts.decode] == pytest.approx([6.0, 15.0, 38.0])
    assert parts.host == pytest.approx(7.0)
    assert parts.total == pytest.approx(66.0)
    assert found.floor.total == pytest.approx(4.0 + 12.0 + 19 * 1.8)
    assert (found.live, found.live_floor) == (34, None)


def test_files_without_a_floor_are_left_out(tmp_path: Path) -> None:
    for chunk in (None, CONTENT["chunk"] | {"gpu": None}, CONTENT["chunk"] | {"floor": None}):
        assert read_figures(written(tmp_path, CONTENT | {"chunk": chunk})) is None
    assert read_figures(written(tmp_path, {"gpu": None})) is None


def test_the_plot_says_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="it draws the plot")
    script = Path(__file__).parents[1] / "scripts" / "plot_results.py"
    output = tmp_path / "plot.svg"
    results = written(tmp_path, CONTENT)
    monkeypatch.setattr(sys, "argv", ["plot_results.py", str(results), "-o", str(output)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    text = output.read_text()
    for said in ("framesink, FP8", "66.0", "50.2", "34", "1,623", "326"):
        assert f"{said}<" in text or f"{said} →<" in text
