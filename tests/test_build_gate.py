"""The quality gate: what is measured, against what, and what becomes of a bundle below it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from reference.quantized_checkpoint import write_quantized_checkpoint
from safetensors.numpy import load_file, save_file

from framesink.build.footage import Footage
from framesink.build.gate import QualityGate, Verification
from framesink.build.quality import measure_quality
from framesink.cli.main import framesink
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import OptionError, VerificationError
from framesink.runtime.models.quantization import LinearScheme

GENERATED = Footage.whole((), 32)
MEASURED = Verification(
    reference="model",
    executor="onnxruntime",
    source="generated scene",
    chunks=4,
    tokens=100,
    kl=0.015,
    worst_kl=0.4,
    top1=0.97,
)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(framesink, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with weights in INT8, which hardly changes what it says."""
    directory = tmp_path_factory.mktemp("gate") / "quantized"
    write_quantized_checkpoint(tiny_checkpoint, directory, LinearScheme.INT8_WEIGHT_ONLY)
    for file in tiny_checkpoint.iterdir():
        if not (directory / file.name).exists():
            shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def judged(
    quantized: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle that passed a gate when it was built."""
    output = tmp_path_factory.mktemp("judged") / "bundle"
    gate = ("--gate", "top1=0.9,kl=0.05", "--gate-checkpoint", tiny_checkpoint)
    result = _run("build", quantized, "-o", output, "--no-plans", *gate)
    assert result.exit_code == 0, result.output
    assert "quality gate" in result.stdout
    return output


@given(
    top1=st.floats(0, 1).map(lambda value: round(value, 6)),
    kl=st.floats(0, 1000).map(lambda value: round(value, 6)),
)
def test_a_gate_is_read_as_it_is_written(top1: float, kl: float) -> None:
    text = f"top1={top1:.6f},kl={kl:.6f}"
    assert QualityGate.parse(text) == QualityGate.parse(f" kl = {kl:.6f}, top1={top1:.6f}")
    gate = QualityGate.parse(text)
    assert (gate.top1, gate.kl) == (top1, kl)


def test_half_a_gate_asks_for_half() -> None:
    gate = QualityGate.parse("top1=0.96")
    MEASURED.check(gate, video_option="--video")
    assert str(gate) == "top1=0.96"
    with pytest.raises(VerificationError, match=r"asked kl=0\.01;"):
        MEASURED.check(QualityGate.parse("kl=0.01"), video_option="--video")


@pytest.mark.parametrize(
    "text",
    ["", "0.98", "top1", "top1=", "top1=x", "top1=-1", "top1=nan", "kl=0.1,kl=0.2", "f1=0.9"],
)
def test_a_gate_that_cannot_be_read(text: str) -> None:
    with pytest.raises(OptionError, match=r"write it as top1=0\.98,kl=0\.02\.$"):
        QualityGate.parse(text)


def test_a_gate_that_can_never_be_reached() -> None:
    with pytest.raises(OptionError, match="1 is the most"):
        QualityGate.parse("top1=98,kl=0.02")


@pytest.mark.parametrize("values", [{"top1": float("nan")}, {"kl": float("nan")}])
def test_what_is_no_number_passes_no_gate(values: dict[str, float]) -> None:
    with pytest.raises(VerificationError):
        MEASURED.model_copy(update=values).check(QualityGate(0.0, float("inf")), video_option="-")


def test_a_16_bit_bundle_is_its_checkpoint(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    measured = measure_quality(Bundle.open(tiny_bundle), tiny_checkpoint, GENERATED)
    assert measured.top1 == 1.0
    assert measured.worst_kl < 1e-4
    assert measured.chunks == 32
    assert measured.tokens >= measured.chunks


def test_damage_is_measured(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With logits twice as large the likeliest tokens stay, and the distributions do not."""
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] *= np.float32(2.0)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    measured = measure_quality(Bundle.open(tiny_bundle), other, GENERATED)
    assert measured.top1 == 1.0
    assert measured.kl > 0.1


def test_the_bundle_holds_what_was_measured(judged: Path) -> None:
    bundle = Bundle.open(judged)
    assert bundle.manifest.verification == "verification.json"
    content = json.loads((judged / "verification.json").read_text())
    assert content["gate"] == "top1=0.9,kl=0.05"
    assert 0.9 <= content["top1"] <= 1.0
    assert 0.0 < content["kl"] <= 0.05
    text = " ".join(_run("inspect", judged).stdout.split())
    assert f"top-1 agreement {content['top1']:.2%}" in text


def test_verify_judges_what_was_measured_at_build_time(judged: Path, tiny_bundle: Path) -> None:
    passed = _run("verify", judged, "--gate", "top1=0.9,kl=0.05")
    assert passed.exit_code == 0, passed.output
    failed = _run("verify", judged, "--gate", "kl=0.0000001")
    assert failed.exit_code == 8
    assert "asked kl=1e-07" in failed.stderr
    unmeasured = _run("verify", tiny_bundle, "--gate", "top1=0.9")
    assert unmeasured.exit_code == 8
    assert "pass --checkpoint" in unmeasured.stderr
    assert _run("verify", judged, "--gate", "best").exit_code == 2


def test_verify_measures_a_quantized_bundle_anew(judged: Path, tiny_checkpoint: Path) -> None:
    stored = json.loads((judged / "verification.json").read_text())
    result = _run("verify", judged, "--checkpoint", tiny_checkpoint, "--gate", "top1=0.9,kl=0.05")
    assert result.exit_code == 0, result.output
    for words in (f"{stored['top1']:.2%}", "≥ 90.00%", f"{stored['kl']:.4g}", "≤ 0.05"):
        assert words in result.stdout
    failed = _run("verify", judged, "--checkpoint", tiny_checkpoint, "--gate", "top1=1,kl=0")
    assert failed.exit_code == 8
    assert "asked top1=1,kl=0;" in failed.stderr


def test_a_quantized_checkpoint_is_no_reference(judged: Path, quantized: Path) -> None:
    result = _run("verify", judged, "--checkpoint", quantized)
    assert result.exit_code == 8
    assert "16-bit checkpoint" in result.stderr


def test_a_bundle_below_the_gate_is_not_kept(
    quantized: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "deep" / "bundle"
    gate = ("--gate", "kl=0.0000001", "--gate-checkpoint", tiny_checkpoint)
    result = _run("build", quantized, "-o", output, "--no-plans", *gate)
    assert result.exit_code == 8, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "asked kl=1e-07" in line
    assert list(tmp_path.iterdir()) == []


def test_without_a_16_bit_checkpoint_the_gate_is_not_run(quantized: Path, tmp_path: Path) -> None:
    result = _run("build", quantized, "-o", tmp_path / "bundle", "--no-plans")
    assert result.exit_code == 0, result.output
    assert "pass --gate-checkpoint" in " ".join(result.stdout.split())
    assert Bundle.open(tmp_path / "bundle").manifest.verification is None
    refused = _run("build", quantized, "-o", tmp_path / "b", "--no-plans", "--gate", "kl=1")
    assert refused.exit_code == 7
    assert "--gate-checkpoint" in refused.stderr


def test_the_gate_needs_torch(
    judged: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framesink.build.quality.find_spec", lambda _: None)
    result = _run("verify", judged, "--checkpoint", tiny_checkpoint)
    assert result.exit_code == 8
    assert "pip install 'framesink[calibration]'" in result.stderr
