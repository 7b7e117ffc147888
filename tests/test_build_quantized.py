"""Bundles of every precision, from a 16-bit checkpoint and from one quantized already."""

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from reference.dense_policies import DenseSinkWindow
from reference.executor_sessions import engine_of, words
from reference.quantized_checkpoint import write_quantized_checkpoint
from reference.scenario import NUM_PAGES, Scenario
from rich.console import Console

from framesink.build.estimate import compiled_bytes, graph_weights
from framesink.build.gate import QualityGate, read_verification
from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.plans.builder import find_builders
from framesink.build.random_checkpoint import SIZES, write_random_checkpoint
from framesink.build.reporter import BuildSummary, SilentReporter
from framesink.cli.summary import print_build_summary
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import (
    BuildError,
    CapacityError,
    CheckpointError,
    FramesinkError,
    OptionError,
    VerificationError,
    VideoError,
)
from framesink.runtime.executors import create_executor
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme, LinearScheme
from framesink.runtime.models.safetensors import read_header, read_tensor

needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in [builder.name for builder in find_builders()],
    reason="tensorrt_rtx is not installed",
)
# What matters less than speed here; calibration asks for at least 16 chunks.
QUICK = {"plans": False, "calibration_chunks": 16, "max_context": 2560, "max_streams": 1}
ANYTHING = QualityGate(top1=0.0, kl=float("inf"))


def _build(checkpoint: Path, output: Path, **options: object) -> BuildSummary:
    given = {**QUICK, **options}
    return build_bundle(BuildOptions(checkpoint, output, **given), SilentReporter())  # type: ignore[arg-type]


def _refusal(kind: type[FramesinkError], checkpoint: Path, output: Path, **options: object) -> str:
    with pytest.raises(kind) as caught:
        _build(checkpoint, output, **options)
    assert not output.parent.exists()
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in FP8, with K and V in INT8."""
    directory = tmp_path_factory.mktemp("quantized") / "checkpoint"
    write_quantized_checkpoint(tiny_checkpoint, directory, LinearScheme.FP8, CacheScheme.INT8)
    for file in tiny_checkpoint.iterdir():
        if not (directory / file.name).exists():
            shutil.copy(file, directory)
    return directory


@pytest.mark.parametrize(
    ("precision", "kv_precision", "codes", "pages", "top1"),
    [
        ("fp8", "fp8", "float8_e4m3fn", "int8", 0.6),
        ("int8", "int8", "int8", "int8", 0.8),
        ("int8-weight-only", None, "int8", "float32", 0.9),
        ("int4-weight-only", None, "uint8", "float32", 0.6),
        ("fp16", "int8", "float16", "int8", 0.9),
    ],
)
def test_every_precision_is_built_and_judged(
    tiny_checkpoint: Path,
    tmp_path: Path,
    precision: str,
    kv_precision: str | None,
    codes: str,
    pages: str,
    top1: float,
) -> None:
    """The random tiny model bears quantization badly; the bounds only tell it from chance."""
    summary = _build(
        tiny_checkpoint,
        tmp_path / "bundle",
        precision=precision,
        kv_precision=kv_precision,
        gate=QualityGate(top1=top1, kl=1.0),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    bundle = Bundle.open(tmp_path / "bundle")
    assert {path.name for path in bundle.directory.iterdir()} == {
        "manifest.json",
        *bundle.manifest.files,
    }
    measured = read_verification(bundle)
    assert measured is not None
    assert measured.top1 >= top1
    tensors = read_header(bundle.path("weights.safetensors"))
    # The one layer whose inputs are a whole number of INT4's groups.
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == codes
    assert tensors["lm_head.weight"].dtype == "float16"
    assert bundle.manifest.language_model.executed.page_type == pages
    stages = [stage.name for stage in summary.stages]
    assert "quality gate" in stages
    assert ("calibrate" in stages) == (precision not in ("int8-weight-only", "int4-weight-only"))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_head_in_one_byte(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    """Two executors read it, and choose the same tokens by it."""
    pytest.importorskip("torch", reason="the cuda executor runs in torch")
    from reference.cpu_executor import cpu_executor

    _build(tiny_checkpoint, tmp_path / "bundle", head_precision=precision, gate=ANYTHING)
    bundle = Bundle.open(tmp_path / "bundle")
    codes = {"fp8": "float8_e4m3fn", "int8": "int8"}[precision]
    tensors = read_header(bundle.path("weights.safetensors"))
    assert tensors["lm_head.weight"].dtype == codes
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "float16"
    assert bundle.manifest.language_model.linears[LinearScheme(precision)] == 1
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    scenario = Scenario(DenseSinkWindow(3, 3, 4, 9))
    said = []
    for executor in (graph, cpu_executor(bundle)):
        with engine_of(bundle, executor) as engine:
            said.append(words(engine, scenario, 8))
    assert said[0] == said[1]


def test_a_quantized_checkpoint_is_used_as_it_is(quantized: Path, tmp_path: Path) -> None:
    _build(quantized, tmp_path / "bundle", precision="fp8", kv_precision="int8")
    bundle = Bundle.open(tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest.is_quantized
    assert (manifest.language_model.precision, manifest.cache_precision) == ("fp8", "int8")
    assert manifest.vision_encoder.linears == {LinearScheme.FP8: 15, LinearScheme.UNQUANTIZED: 2}
    checkpoint = Checkpoint.open(quantized)
    written = read_header(bundle.path("weights.safetensors"))
    # Each tensor once; what is quantized byte by byte.
    assert written.keys() == checkpoint.tensors.keys()
    for name, info in checkpoint.tensors.items():
        if info.dtype == "float8_e4m3fn" or "scale" in name:
            assert np.array_equal(read_tensor(written[name]), checkpoint.read(name))
    description = json.loads(bundle.path("framesink_quant.json").read_text())
    assert description["cache"] == "int8"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "--precision int8 contradicts"),
        ({"precision": "fp16"}, "holds fp8 there"),
        ({"head_precision": "fp8"}, "--head-precision fp8 contradicts"),
        ({"vision_precision": "fp16"}, "--vision-precision fp16 contradicts"),
        ({"kv_precision": "fp8"}, "--kv-precision fp8 contradicts"),
        ({"recipe": Path("recipe.toml")}, "--recipe has no effect"),
        ({"observer": "mse"}, "--observer has no effect"),
    ],
)
def test_options_that_contradict_a_quantized_checkpoint(
    quantized: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    output = tmp_path / "new" / "bundle"
    assert words in _refusal(BuildError, quantized, output, judge=False, **options)


@needs_rtx
@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"kv_precision": "fp8"}])
def test_fp8_is_refused_where_it_does_not_run(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    output = tmp_path / "new" / "bundle"
    given = {"plans": True, "targets": ("sm86", "sm89"), **options}
    message = _refusal(BuildError, tiny_checkpoint, output, **given)
    assert "FP8 does not run on sm86; compile for sm89 and sm120" in message


def test_what_the_gate_cannot_compare_with_is_refused_before_any_work(
    quantized: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output, other = tmp_path / "new" / "bundle", tmp_path / "other"
    for checkpoint in (quantized, tiny_checkpoint):
        options = {"gate": ANYTHING, "gate_checkpoint": quantized}
        assert "quantized itself" in _refusal(VerificationError, checkpoint, output, **options)
    write_random_checkpoint("tiny", other)
    message = _refusal(VerificationError, quantized, output, gate_checkpoint=other)
    assert "its sizes differ" in message
    message = _refusal(CheckpointError, quantized, output, gate_checkpoint=tmp_path / "nothing")
    assert "no checkpoint directory" in message


def test_an_observer_without_quantization_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    message = _refusal(BuildError, tiny_checkpoint, tmp_path / "new" / "bundle", observer="mse")
    assert "--observer has no effect" in message


@pytest.mark.parametrize("precision", ["int8", "int4-weight-only"])
def test_an_observer_without_fp8_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    options = {"precision": precision, "kv_precision": "int8", "observer": "percentile"}
    message = _refusal(OptionError, tiny_checkpoint, tmp_path / "new" / "bundle", **options)
    assert "--observer percentile has no effect" in message


def test_a_still_picture_is_noticed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import cv2

    video = tmp_path / "still.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 2.0, (64, 64))
    for _ in range(60):
        writer.write(np.full((64, 64, 3), 128, dtype=np.uint8))
    writer.release()
    options = {"precision": "int8", "calibration_videos": (video,), "judge": False}
    summary = _build(tiny_checkpoint, tmp_path / "bundle", **options)
    assert any("never changed on the calibration video" in note for note in summary.notes)


def test_a_recipe_decides_layer_by_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'language_model = "int8-weight-only"\n[overrides]\n"model.layers.1.*" = "fp16"\n'
    )
    _build(tiny_checkpoint, tmp_path / "bundle", recipe=recipe, judge=False)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.language_model.linears == {
        LinearScheme.INT8_WEIGHT_ONLY: 14,
        LinearScheme.UNQUANTIZED: 8,
    }
    assert manifest.vision_encoder.precision == "fp16"
    assert manifest.verification is None


def test_recipes_that_cannot_be_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "bundle"
    recipe = tmp_path / "recipe.toml"
    missing = _refusal(OptionError, tiny_checkpoint, output, recipe=recipe)
    assert "recipe.toml" in missing
    recipe.write_text('language_model = "int8"\n')
    both = _refusal(BuildError, tiny_checkpoint, output, recipe=recipe, precision="int8")
    assert "leave --precision int8 out" in both


def test_a_bundle_below_the_gate_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "bundle"
    gate = QualityGate(top1=1.0, kl=0.0)
    message = _refusal(
        VerificationError, tiny_checkpoint, output, precision="int8-weight-only", gate=gate
    )
    assert "top-1 agreement 0.9" in message
    assert "asked top1=1,kl=0" in message


def test_a_short_calibration_video_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import cv2

    video = tmp_path / "short.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 4.0, (64, 64))
    for shade in range(12):
        writer.write(np.full((64, 64, 3), 20 * shade, dtype=np.uint8))
    writer.release()
    message = _refusal(
        VideoError,
        tiny_checkpoint,
        tmp_path / "new" / "bundle",
        precision="int8",
        calibration_videos=(video,),
    )
    assert "yields 3 chunks of 1 s, 2 to calibrate on and 1 held back" in message
    assert "at least 16 and 8 are needed" in message


def test_torch_is_asked_for_where_it_is_needed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("device", "quantization_plan"):
        monkeypatch.setattr(f"framesink.build.{module}.find_spec", lambda _: None)
    output = tmp_path / "new" / "bundle"
    message = _refusal(BuildError, tiny_checkpoint, output, precision="int8", judge=False)
    assert "pip install 'framesink[calibration]'" in message
    message = _refusal(BuildError, tiny_checkpoint, output, precision="int8-weight-only")
    assert "--no-gate" in message
    _build(tiny_checkpoint, output, precision="int8-weight-only", judge=False)


def test_a_device_that_is_none_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "bundle"
    with pytest.raises(OptionError, match="torch cannot use --device abacus"):
        _build(tiny_checkpoint, output, precision="int8", device="abacus")
    assert not output.parent.exists()


def test_a_context_too_short_to_stream_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "bundle"
    message = _refusal(CapacityError, tiny_checkpoint, output, precision="int8", max_context=256)
    assert "larger max_context" in message


class _InterruptedIn(SilentReporter):
    """Presses Ctrl-C in the middle of a stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._running = ""

    def stage(self, name: str) -> None:
        self._running = name

    def progress(self, fraction: float, detail: str = "") -> None:
        if self._running == self._stage:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["calibrate", "quantize", "quality gate"])
def test_an_interrupt_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, stage: str) -> None:
    options = BuildOptions(
        tiny_checkpoint,
        tmp_path / "new" / "bundle",
        precision="int8-weight-only",
        kv_precision="int8" if stage == "calibrate" else None,
        gate=ANYTHING,
        **QUICK,  # type: ignore[arg-type]
    )
    with pytest.raises(KeyboardInterrupt):
        build_bundle(options, _InterruptedIn(stage))
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize("scheme", [LinearScheme.FP8, LinearScheme.INT8])
def test_the_plan_has_one_byte_per_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: LinearScheme
) -> None:
    """A plan holds 8 MB of kernels besides, so the model must be wide for it to show."""
    vision = {**SIZES["tiny"]["vision_config"], "out_hidden_size": 1024}
    wide = {
        **SIZES["tiny"],
        "hidden_size": 1024,
        "intermediate_size": 12_288,
        "num_hidden_layers": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [32, 48, 48]},
        "vision_config": vision,
    }
    monkeypatch.setitem(SIZES, "wide", wide)  # type: ignore[arg-type]
    plain, directory = tmp_path / "plain", tmp_path / "quantized"
    write_random_checkpoint("wide", plain)
    write_quantized_checkpoint(plain, directory, scheme)
    shutil.copy(plain / "tokenizer.json", directory)
    options = {"plans": True, "targets": ("sm89",), "max_context": 128, "judge": False}
    summary = _build(directory, tmp_path / "bundle", **options)
    manifest = summary.manifest
    plan = manifest.files[manifest.language_model.plans[0].path].size
    weights = graph_weights(manifest.model, "language_model")
    assert 1.0 < plan / weights < 1.35
    estimated = compiled_bytes(manifest.model, Checkpoint.open(directory).quantization)
    assert estimated["language_model"] == pytest.approx(weights, rel=0.05)
    console = Console(file=StringIO(), width=200)
    print_build_summary(summary, console)
    assert f"{plan / weights:.2f}" in console.file.getvalue()  # type: ignore[attr-defined]
