"""The table of what every precision costs: simulated, held against the bundle it stands for."""

import json
from itertools import islice
from pathlib import Path

import cv2
import pytest
from click.testing import CliRunner, Result

from framesink.build.accuracy import AccuracyRow, AccuracyTable, read_accuracy
from framesink.calibration.samples import generate_chunks
from framesink.cli.main import framesink
from framesink.runtime.bundle import Bundle
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import INT4_GROUP, quantizable_linears

pytest.importorskip("torch", reason="precisions are simulated in torch")

LINEARS = {"fp16", "fp8", "int8", "int8-weight-only", "int4-weight-only"}
CACHES = {"fp16", "int8", "fp8"}
MEASURED = ("int8-weight-only", "int8")
NO_BUNDLE = ("--no-plans", "--max-context", 2560, "--max-streams", 1)


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(framesink, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def _row(table: AccuracyTable, precision: str, cache: str) -> AccuracyRow:
    (row,) = (r for r in table.rows if (r.precision, r.kv_precision) == (precision, cache))
    return row


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 seconds of a generated scene: 16 to calibrate on, 8 to judge on."""
    path = tmp_path_factory.mktemp("video") / "scene.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 2.0, (112, 112))
    for frames in islice(generate_chunks(2, 112), 24):
        for frame in frames:
            writer.write(frame[..., ::-1].copy())
    writer.release()
    return path


@pytest.fixture(scope="module")
def compared(tiny_checkpoint: Path, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with weights and K/V in INT8 that was built with --compare. Inputs are not rounded,
    as those next to a tie may be rounded differently, and a few tokens are all there are."""
    output = tmp_path_factory.mktemp("compared") / "bundle"
    precisions = ("--precision", "int8-weight-only", "--kv-precision", "int8")
    gate = ("--calibration-video", video, "--gate", "top1=0,kl=9")
    _run("build", tiny_checkpoint, "-o", output, *precisions, "--compare", *gate, *NO_BUNDLE)
    return output


def test_every_precision_has_a_row(compared: Path, tiny_checkpoint: Path) -> None:
    table = read_accuracy(Bundle.open(compared))
    assert table is not None
    rows = {(row.precision, row.kv_precision) for row in table.rows}
    assert rows == {(precision, cache) for precision in LINEARS for cache in CACHES}
    assert len(table.rows) == len(rows)
    plain = _row(table, "fp16", "fp16")
    assert (plain.kl, plain.worst_kl, plain.top1) == (0.0, 0.0, 1.0)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    weights = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
    assert plain.weight_bytes == weights / 2  # the tiny checkpoint is in float32
    for row in table.rows:
        if row != plain:
            assert 0.0 < row.kl <= row.worst_kl
        if row.precision != "fp16":
            assert row.weight_bytes is not None
            assert row.weight_bytes < plain.weight_bytes


def test_the_simulation_tells_what_the_bundle_does(compared: Path) -> None:
    """The gate ran the real graphs in ONNX Runtime over the same held-back video."""
    table = read_accuracy(Bundle.open(compared))
    assert table is not None
    row = _row(table, *MEASURED)
    others = [other.kl for other in table.rows if other != row]
    measured = json.loads((compared / "verification.json").read_text())
    assert (table.source, table.chunks) == (measured["source"], measured["chunks"])
    assert table.tokens == measured["tokens"]
    assert row.kl == pytest.approx(measured["kl"], rel=0.1)
    assert row.worst_kl == pytest.approx(measured["worst_kl"], rel=0.2)
    assert all(kl != pytest.approx(measured["kl"], rel=0.1) for kl in others)


def test_nothing_calibrated_on_is_judged_on(compared: Path) -> None:
    table = read_accuracy(Bundle.open(compared))
    assert table is not None
    assert (table.source, table.chunks) == ("scene.avi from chunk 16", 8)
    assert table.notes[0] == "Calibrated on scene.avi up to chunk 16."


def test_what_cannot_be_int4_is_told(compared: Path, tiny_checkpoint: Path) -> None:
    table = read_accuracy(Bundle.open(compared))
    assert table is not None
    linears = quantizable_linears(Checkpoint.open(tiny_checkpoint).config)
    asked = [shape for name, shape in linears.items() if ".layers." in name or ".blocks." in name]
    held = sum(inputs % INT4_GROUP != 0 for _, inputs in asked)
    assert 0 < held < len(asked)
    assert f"{held} of {len(asked)} layers are held in INT8" in table.notes[1]


def test_a_recipe_of_its_own_has_a_row_and_goes_into_the_bundle(
    tiny_checkpoint: Path, video: Path, tmp_path: Path
) -> None:
    recipe, quantized = tmp_path / "recipe.toml", tmp_path / "quantized"
    recipe.write_text(
        'language_model = "fp8"\n[overrides]\n"model.layers.0.mlp.*" = "fp16"\n', encoding="utf-8"
    )
    options = ("--recipe", recipe, "--calibration-video", video, "--compare")
    shown = _run("calibrate", tiny_checkpoint, "-o", quantized, *options).stdout
    assert "median" in shown
    table = AccuracyTable.read(quantized / "accuracy.json")
    assert (table.rows[-1].precision, table.rows[-1].vision_precision) == ("fp8 (recipe)", "fp16")
    assert 0.0 < table.rows[-1].kl < _row(table, "fp8", "fp16").kl * 2
    _run("build", quantized, "-o", tmp_path / "bundle", *NO_BUNDLE)
    bundle = Bundle.open(tmp_path / "bundle")
    assert read_accuracy(bundle) == table
    assert bundle.path("accuracy.md").read_text() == table.to_markdown()
    result = CliRunner().invoke(
        framesink, ["build", str(quantized), "-o", str(tmp_path / "b"), "--compare"]
    )
    assert result.exit_code == 7
    assert "--compare simulates every precision of a 16-bit checkpoint" in result.stderr
