"""The command line: what it prints, its exit codes, and Ctrl-C."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from framesink.cli.main import COMMANDS, framesink
from framesink.runtime.manifest import Manifest


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(framesink, [str(argument) for argument in arguments])


def _refused(code: int, *arguments: object) -> str:
    """The one line a refused command prints."""
    result = _run(*arguments)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert result.stdout == ""
    return line


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A bundle built through the command line, and what it printed."""
    output = tmp_path_factory.mktemp("built") / "bundle"
    return output, _run("build", tiny_checkpoint, "-o", output, "--no-plans", "--max-streams", 2)


def test_build_ends_with_a_summary(built: tuple[Path, Result]) -> None:
    output, result = built
    assert result.exit_code == 0, result.output
    for words in ("vision_encoder", "language_model", "fp16", "write weights", "peak memory"):
        assert words in result.stdout
    assert "--no-plans" in result.stdout
    assert str(output) in result.stdout.replace("\n", "")


def test_inspect_is_readable_and_has_json(built: tuple[Path, Result]) -> None:
    output, _ = built
    text = _run("inspect", output).stdout
    for words in ("3 layers", "2 streams", "float32", "no plan", "files"):
        assert words in text
    manifest = Manifest.model_validate_json(_run("inspect", output, "--json").stdout)
    assert manifest.limits.max_streams == 2


def test_verify_compares_with_the_checkpoint(
    built: tuple[Path, Result], tiny_checkpoint: Path
) -> None:
    output, _ = built
    result = _run("verify", output, "--checkpoint", tiny_checkpoint, "--tokens", 4)
    assert result.exit_code == 0, result.output
    assert "100.0% of 4" in result.stdout
    alone = _run("verify", output)
    assert alone.exit_code == 0
    assert "pass --checkpoint" in alone.stdout.replace("\n", " ")


def test_verify_ends_with_8_when_the_bundle_disagrees(
    built: tuple[Path, Result], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = np.flip(tensors["lm_head.weight"], axis=0).copy()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    result = _run("verify", built[0], "--checkpoint", other, "--tokens", 2)
    assert result.exit_code == 8, result.output
    assert "logits differ" in result.stderr


def test_verify_needs_transformers(
    built: tuple[Path, Result], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framesink.build.verify.find_spec", lambda _: None)
    result = _run("verify", built[0], "--checkpoint", tiny_checkpoint)
    assert result.exit_code == 8
    assert "pip install 'framesink[reference]'" in result.stderr


def test_a_changed_byte_ends_with_4(built: tuple[Path, Result], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(built[0], damaged)
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "weights.safetensors" in _refused(4, "verify", damaged)


def test_calibrate_writes_ranges_and_says_what_they_mean(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = _run("calibrate", tiny_checkpoint, "-o", tmp_path / "ranges")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("safe in float16") == 2
    ranges = json.loads((tmp_path / "ranges" / "activation_ranges.json").read_text())
    names = [layer["layer"] for layer in ranges["language_model"]["layers"]]
    assert names[1:4] == ["model.layers.0", "model.layers.1", "model.layers.2"]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (3, ["build", "{tmp}/nothing", "-o", "{tmp}/out", "--no-plans"]),
        (3, ["calibrate", "{tmp}/nothing", "-o", "{tmp}/out"]),
        (4, ["inspect", "{tmp}/nothing"]),
        (4, ["verify", "{tmp}/nothing"]),
        (7, ["build", "{model}", "-o", "{tmp}/out", "--target", "sm86", "--precision", "fp8"]),
        (7, ["build", "{model}", "-o", "{tmp}/out", "--target", "sm10"]),
        (7, ["build", "{model}", "-o", "{model}/config.json", "--no-plans"]),
        (7, ["build", "{model}", "-o", "{model}/config.json/bundle", "--no-plans"]),
        (7, ["build", "{model}", "-o", "{model}", "--no-plans", "--force"]),
    ],
)
def test_refusals_are_one_sentence_and_an_exit_code(
    tiny_checkpoint: Path, tmp_path: Path, code: int, arguments: list[str]
) -> None:
    _refused(code, *(text.format(tmp=tmp_path, model=tiny_checkpoint) for text in arguments))
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_command() -> None:
    """A person who asks for help must not wait for ONNX Runtime to load."""
    script = (
        "import sys\n"
        "from framesink.cli.main import framesink\n"
        "framesink(['--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'cv2', 'torch', 'rich', 'pydantic'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


def test_build_engines_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from framesink.cli.main import build_engines as f; f()"]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("Usage: build-engines [OPTIONS] MODEL_DIR")
    result = subprocess.run(
        [*command, str(tmp_path / "nothing"), "-o", str(tmp_path / "out"), "--no-plans"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_with_130_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, how: signal.Signals
) -> None:
    command = [
        *(sys.executable, "-c", "from framesink.cli.main import build_engines as f; f()"),
        *(str(tiny_checkpoint), "-o", str(tmp_path / "deep" / "bundle"), "--no-plans"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "deep").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(how)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Interrupted." in errors
    assert list(tmp_path.iterdir()) == []
