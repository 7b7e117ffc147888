"""`framesink calibrate` where something is quantized."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from framesink.calibration.recipe import Recipe
from framesink.calibration.videos import DEFAULT_CHUNKS
from framesink.cli.main import framesink
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme, LinearScheme

pytest.importorskip("torch", reason="calibration runs in torch")

STREAMING = {
    "vision_seconds": 3,
    "reply_turns": 3,
    "sink_text": 6,
    "recent_text": 6,
    "max_new_tokens": 4,
    "min_pixels": 3136,
    "max_pixels": 4704,
}
FEW = ("--chunks", 6, "--min-chunks", 4)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(framesink, ["calibrate", *map(str, arguments)])


def refused(code: int, *arguments: object) -> str:
    """The one line a refused command prints."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert result.stdout == ""
    return line


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with small frames and short windows."""
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    shutil.copytree(tiny_checkpoint, directory)
    (directory / "streaming_config.json").write_text(json.dumps(STREAMING))
    return directory


@pytest.fixture(scope="module")
def statistics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """A first run: where its statistics and its checkpoint are, and what it printed."""
    directory = tmp_path_factory.mktemp("first")
    kept, output = directory / "statistics", directory / "int8"
    precisions = ("--precision", "int8", "--kv-precision", "int8")
    return kept, output, run(model, "-o", output, *precisions, "--statistics", kept, *FEW)


@pytest.mark.parametrize("command", ["build", "calibrate"])
def test_help_tells_how_many_chunks_are_watched(command: str) -> None:
    text = CliRunner().invoke(framesink, [command, "--help"]).stdout
    assert f"[default: {DEFAULT_CHUNKS}]" in " ".join(text.split())


def test_a_checkpoint_is_observed_and_quantized(
    model: Path, statistics: tuple[Path, Path, Result]
) -> None:
    _, output, result = statistics
    assert result.exit_code == 0, result.output
    assert "observe video" in result.stderr
    for words in ("6 chunks of generated scene", "in int8", "SmoothQuant", "0 dead"):
        assert words in result.stdout
    quantization = Checkpoint.open(output).quantization
    assert quantization is not None
    assert quantization.cache is CacheScheme.INT8
    schemes = {name: quantization.scheme(name) for name in ("lm_head", "visual.merger.mlp.0")}
    assert set(schemes.values()) == {LinearScheme.UNQUANTIZED}
    assert quantization.scheme("model.layers.1.mlp.up_proj") is LinearScheme.INT8
    assert quantization.scheme("visual.blocks.1.attn.qkv") is LinearScheme.INT8
    recipe = Recipe.read(output / "recipe.toml")
    assert recipe.resolve(Checkpoint.open(model).config) == quantization


def test_what_was_observed_is_used_again(
    model: Path, statistics: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    kept, output, _ = statistics
    again = tmp_path / "again"
    result = run(model, "-o", again, "--recipe", output / "recipe.toml", "--statistics", kept)
    assert result.exit_code == 0, result.output
    assert "observe video" not in result.stderr
    assert "Uses the statistics" in result.stderr
    first, second = (load_file(path / "model.safetensors") for path in (output, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])


def test_statistics_of_another_checkpoint_are_refused(
    model: Path, statistics: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    options = ("-o", tmp_path / "out", "--precision", "fp8", "--statistics", statistics[0])
    assert "another checkpoint" in refused(3, other, *options)
    assert not (tmp_path / "out").exists()


def test_weights_alone_need_no_video(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "int8"
    result = run(model, "-o", output, "--precision", "int8-weight-only")
    assert result.exit_code == 0, result.output
    assert "observe video" not in result.stderr
    quantization = Checkpoint.open(output).quantization
    assert quantization is not None
    assert set(quantization.linears.values()) == {LinearScheme.INT8_WEIGHT_ONLY}


def test_parts_are_chosen_apart(
    model: Path, statistics: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    output = tmp_path / "fp8"
    precisions = ("--precision", "fp16", "--vision-precision", "fp8", "--observer", "mse")
    result = run(model, "-o", output, *precisions, "--statistics", statistics[0])
    assert result.exit_code == 0, result.output
    quantization = Checkpoint.open(output).quantization
    assert quantization is not None
    assert all(name.startswith("visual.blocks.") for name in quantization.linears)
    assert set(quantization.linears.values()) == {LinearScheme.FP8}
    assert quantization.cache is CacheScheme.UNQUANTIZED


def test_sensitive_layers_stay_in_16_bit_within_a_budget(
    model: Path, statistics: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    output = tmp_path / "kept"
    result = run(
        *(model, "-o", output, "--precision", "int8", "--statistics", statistics[0]),
        *("--sensitivity", "--keep-bytes", 9000),
    )
    assert result.exit_code == 0, result.output
    assert "rank layers" in result.stderr
    assert "mean KL" in result.stdout
    assert "Kept in 16 bits, for" in result.stdout
    kept = Recipe.read(output / "recipe.toml").overrides
    assert kept
    assert set(kept.values()) == {"fp16"}
    shapes = {name: Checkpoint.open(model).info(f"{name}.weight").shape for name in kept}
    assert sum(rows * columns for rows, columns in shapes.values()) <= 9000
    quantization = Checkpoint.open(output).quantization
    assert quantization is not None
    assert not quantization.linears.keys() & kept.keys()
    assert "model.layers.0.mlp.gate_proj" in {**quantization.linears, **kept}


def test_too_little_video_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    video = tmp_path / "short.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 4.0, (84, 56))
    for _ in range(8):
        writer.write(np.zeros((56, 84, 3), np.uint8))
    writer.release()
    options = ("-o", tmp_path / "out", "--precision", "fp8", "--calibration-video", video)
    line = refused(5, model, *options)
    assert "yields 2 chunks" in line
    assert "at least 16 are needed" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        (2, ("--sensitivity",), "--sensitivity has no effect"),
        (2, ("--precision", "fp16", "--min-chunks", 3), "--min-chunks has no effect"),
        (2, ("--precision", "fp8", "--keep-bytes", 9), "need --sensitivity"),
        (2, ("--precision", "int8", "--observer", "mse"), "--observer mse has no effect"),
        (2, ("--kv-precision", "int8", "--sensitivity"), "ranks linear layers"),
        (
            2,
            ("--precision", "fp8", "--sensitivity", "--keep-bytes", 9, "--keep-for-kl", 0.1),
            "two budgets",
        ),
        (2, ("--precision", "fp8", "--chunks", 3), "3 chunks are fewer than the 16"),
        (2, ("--precision", "fp8", "--device", "abacus"), "--device abacus"),
        (2, ("--recipe", "{tmp}/nothing.toml"), "nothing.toml"),
        (5, ("--precision", "fp8", "--calibration-video", "{tmp}"), "holds no video"),
    ],
)
def test_options_that_make_no_sense(
    model: Path, tmp_path: Path, code: int, options: tuple[object, ...], words: str
) -> None:
    given = [str(option).replace("{tmp}", str(tmp_path)) for option in options]
    assert words in refused(code, model, "-o", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(
    statistics: tuple[Path, Path, Result], tmp_path: Path
) -> None:
    _, output, _ = statistics
    line = refused(3, output, "-o", tmp_path / "out", "--precision", "int8")
    assert "quantized already" in line
    assert "--force" in refused(9, output, "-o", output, "--precision", "int8")


def test_only_weights_are_quantized_without_torch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("framesink.build.quantization_plan", "framesink.build.device"):
        monkeypatch.setattr(f"{module}.find_spec", lambda _: None)
    for options in (("int8",), ("int8-weight-only", "--sensitivity")):
        line = refused(7, model, "-o", tmp_path / "out", "--precision", *options)
        assert "pip install 'framesink[calibration]'" in line
