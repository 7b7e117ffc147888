"""Building whole bundles: what comes out, what is refused, and that failures leave nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from framesink.build.checkpoint_files import StreamingConfig, read_preprocess_config
from framesink.build.gate import QualityGate
from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.plans.builder import PlanBuilder, find_builders
from framesink.build.random_checkpoint import write_random_checkpoint
from framesink.build.reporter import SilentReporter
from framesink.build.staging import staged_directory
from framesink.build.verify import verify_bundle
from framesink.build.weights import write_weights
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import (
    BuildError,
    CapacityError,
    CheckpointError,
    FramesinkError,
    VerificationError,
    VideoError,
)
from framesink.runtime.executors.tensorrt.interface import check_plan
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import LinearScheme

needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in [builder.name for builder in find_builders()],
    reason="tensorrt_rtx is not installed",
)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, directory)
    return directory


def _build(checkpoint: Path, output: Path, **options: object) -> Bundle:
    given = {"plans": False, **options}
    build_bundle(BuildOptions(checkpoint, output, **given), SilentReporter())  # type: ignore[arg-type]
    return Bundle.open(output)


def _refusal(kind: type[FramesinkError], checkpoint: Path, output: Path, **options: object) -> str:
    before = _everything(output.parent)
    with pytest.raises(kind) as caught:
        _build(checkpoint, output, **options)
    assert _everything(output.parent) == before
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def _everything(directory: Path) -> dict[str, bytes | None]:
    """All paths below a directory and the content of its files."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def _scale_weight(checkpoint: Path, name: str, factor: float) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (match,) = [key for key in tensors if key.endswith(name)]
    tensors[match] = tensors[match] * np.float32(factor)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


class _InterruptedAt(SilentReporter):
    """Presses Ctrl-C when a stage begins, or in the middle of it."""

    def __init__(self, stage: str, *, in_the_middle: bool) -> None:
        self._stage = stage
        self._in_the_middle = in_the_middle
        self._running = ""

    def stage(self, name: str) -> None:
        self._running = name
        if name == self._stage and not self._in_the_middle:
            raise KeyboardInterrupt

    def progress(self, fraction: float, detail: str = "") -> None:
        if self._running == self._stage:
            raise KeyboardInterrupt


@needs_rtx
def test_a_bundle_with_plans(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = _build(
        tiny_checkpoint,
        tmp_path / "bundle",
        plans=True,
        targets=("sm89",),
        max_context=128,
        max_streams=2,
    )
    for part in ("language_model", "vision_encoder"):
        plan = bundle.plan_for(part, "sm89")  # type: ignore[arg-type]
        spec = bundle.manifest.part(part)  # type: ignore[arg-type]
        assert bundle.path(plan.path).stat().st_size > 100_000
        assert plan.compute_type == "float16"
        check_plan(bundle.manifest, part, plan)  # type: ignore[arg-type]
        # What TensorRT parsed has the interface that was authored.
        assert {value.name: value.dtype for value in plan.inputs} == {
            value.name: value.dtype for value in spec.compiled.inputs
        }
        assert {value.name for value in plan.outputs} == {
            value.name for value in spec.compiled.outputs
        }
        assert all(
            set(profile.inputs) == {v.name for v in plan.inputs} for profile in plan.profiles
        )
    assert [p.name for p in bundle.plan_for("language_model", "sm89").profiles] == [
        "prefill",
        "decode",
    ]


@pytest.mark.parametrize("executed_type", ["float16", "float32"])
def test_a_bundle_computes_what_its_checkpoint_does(
    tiny_checkpoint: Path, tmp_path: Path, executed_type: str
) -> None:
    bundle = _build(tiny_checkpoint, tmp_path / "bundle", executed_type=executed_type)
    report = verify_bundle(bundle, tiny_checkpoint, tokens=12)
    assert report.agreeing_tokens == 12
    assert report.relative_logit_error < 0.01
    assert report.relative_vision_error < 0.01
    report.check()


def test_a_random_checkpoint_is_one_that_transformers_loads(tmp_path: Path) -> None:
    write_random_checkpoint("tiny", tmp_path / "random")
    bundle = _build(tmp_path / "random", tmp_path / "bundle")
    verify_bundle(bundle, tmp_path / "random", tokens=2).check()
    text = "<|im_start|>user\nTime=1.0s é<|video_pad|>"
    tokenizer = bundle.tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == "user\nTime=1.0s é"
    assert tokenizer.encode(text)[-1] == bundle.manifest.model.video_token_id


@pytest.mark.parametrize(
    "scheme", [LinearScheme.FP8, LinearScheme.INT8, LinearScheme.INT8_WEIGHT_ONLY]
)
def test_a_random_checkpoint_may_be_quantized(scheme: LinearScheme, tmp_path: Path) -> None:
    write_random_checkpoint("tiny", tmp_path, scheme=scheme)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quantization is not None
    # q, k, v, o, gate, up and down in 4 blocks; qkv, proj, gate, up and down in 4 more.
    assert list(checkpoint.quantization.linears.values()) == [scheme] * 48
    codes = checkpoint.read("model.layers.0.mlp.up_proj.weight").astype(np.float32)
    scales = checkpoint.read("model.layers.0.mlp.up_proj.weight_scale")
    assert (codes * scales[:, None]).std() == pytest.approx(0.02, rel=0.03)
    largest = 448 if scheme is LinearScheme.FP8 else 127
    assert 0.6 * largest < np.abs(codes).max() <= largest


def test_a_bundle_of_other_weights_is_found_out(checkpoint: Path, tmp_path: Path) -> None:
    bundle = _build(checkpoint, tmp_path / "bundle")
    _scale_weight(checkpoint, "layers.1.mlp.down_proj.weight", 1.5)
    report = verify_bundle(bundle, checkpoint, tokens=4)
    with pytest.raises(VerificationError, match="logits differ"):
        report.check()
    _scale_weight(checkpoint, "blocks.1.mlp.down_proj.weight", 3.0)
    report = verify_bundle(bundle, checkpoint, tokens=1)
    assert report.relative_vision_error > 0.05


def test_activations_beyond_fp16_lead_to_bf16(checkpoint: Path, tmp_path: Path) -> None:
    # What down_proj blows up, the norm after it makes small again: the model stays usable.
    _scale_weight(checkpoint, "layers.0.mlp.down_proj.weight", 1e5)
    bundle = _build(checkpoint, tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest.language_model.precision == "bf16"
    assert manifest.language_model.compiled.compute_type == "bfloat16"
    assert manifest.cache_precision == "bf16"
    assert manifest.vision_encoder.precision == "fp16"
    report = verify_bundle(bundle, checkpoint, tokens=4)
    assert np.isfinite(report.max_logit_error)
    report.check()


def test_the_ranges_left_by_calibrate_are_used_for_their_own_weights_only(
    checkpoint: Path, tmp_path: Path
) -> None:
    ranges = _build(checkpoint, tmp_path / "first").path("activation_ranges.json")
    edited = json.loads(ranges.read_text())
    edited["language_model"]["layers"][0]["maxima"]["output"] = 1e9
    (checkpoint / "activation_ranges.json").write_text(json.dumps(edited))
    second = _build(checkpoint, tmp_path / "second")
    assert second.manifest.language_model.precision == "bf16"
    _scale_weight(checkpoint, "model.norm.weight", 1.01)
    third = _build(checkpoint, tmp_path / "third")
    assert third.manifest.language_model.precision == "fp16"


def test_streaming_config_sets_the_defaults(checkpoint: Path, tmp_path: Path) -> None:
    content = {"sink_text": 7, "query": "What happens?", "fps": 4.0, "max_pixels": 56 * 56}
    (checkpoint / "streaming_config.json").write_text(json.dumps(content))
    manifest = _build(checkpoint, tmp_path / "bundle").manifest
    assert manifest.streaming.sink_text == 7
    assert manifest.streaming.recent_text == 512
    assert manifest.streaming.query == "What happens?"
    assert manifest.preprocess.fps == 4.0
    assert manifest.preprocess.max_pixels == 56 * 56
    assert manifest.limits.max_patches == 2 * 16  # two steps of 4 x 4 patches in a second


def test_both_layouts_of_pixel_limits_are_read(checkpoint: Path) -> None:
    vision = Checkpoint.open(checkpoint).config.vision
    path = checkpoint / "preprocessor_config.json"
    sizes = []
    for content in (
        {"min_pixels": 3136, "max_pixels": 50176},
        {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
    ):
        path.write_text(json.dumps(content))
        config = read_preprocess_config(checkpoint, StreamingConfig(), vision)
        sizes.append((config.min_pixels, config.max_pixels))
    assert sizes == [(3136, 50176)] * 2


def test_an_existing_bundle_is_replaced_only_by_force(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    _build(tiny_checkpoint, output)
    assert "--force" in _refusal(BuildError, tiny_checkpoint, output)
    replaced = _build(tiny_checkpoint, output, force=True, max_streams=3)
    assert replaced.manifest.limits.max_streams == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "home"
    output.mkdir()
    (output / "letters.txt").write_text("dear")
    message = _refusal(BuildError, tiny_checkpoint, output, force=True)
    assert "no engine bundle" in message


@pytest.mark.parametrize("stage", ["observe activations", "write weights", "author graphs"])
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_leaves_everything_as_it_was(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, stage: str, force: bool
) -> None:
    parent = tmp_path / "new" / "deep"
    output = parent / "bundle"
    if force:
        shutil.copytree(tiny_bundle, output)
    before = _everything(tmp_path)
    options = BuildOptions(tiny_checkpoint, output, plans=False, force=force)
    for in_the_middle in (False, True):
        if in_the_middle and stage == "author graphs":
            continue  # too short to report progress
        with pytest.raises(KeyboardInterrupt):
            build_bundle(options, _InterruptedAt(stage, in_the_middle=in_the_middle))
        assert _everything(tmp_path) == before


@needs_rtx
def test_an_interrupt_while_compiling_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(tiny_checkpoint, tmp_path / "bundle", targets=("sm89",), max_context=128)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(options, _InterruptedAt("compile language_model", in_the_middle=True))
    assert _everything(tmp_path) == {}


def test_an_old_bundle_survives_a_failing_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "old").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == output and (self / "new").exists():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match="Input/output error"), staged_directory(output) as staging:
        (staging / "new").write_text("new")
    assert _everything(tmp_path) == {"bundle": None, "bundle/old": b"old"}


def test_outputs_that_cannot_be_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert f"{file} is a file" in _refusal(BuildError, tiny_checkpoint, file / "deep" / "bundle")
    assert "no directory" in _refusal(BuildError, tiny_checkpoint, file)


def test_an_unwritable_place(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(self: Path, *arguments: object, **options: object) -> None:
        if self.suffix == ".partial":
            raise PermissionError(13, "Permission denied")
        make(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = _refusal(BuildError, tiny_checkpoint, tmp_path / "a" / "bundle")
    assert "Permission denied" in message


def test_a_disk_that_fills_up(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("framesink.build.bundle_writer.onnx_ir.save", fill)
    message = _refusal(BuildError, tiny_checkpoint, tmp_path / "bundle")
    assert "No space left on device" in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: shutil.rmtree(d), "no checkpoint directory"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: _truncate(d / "model.safetensors"), "truncated"),
        (lambda d: _edit(d / "config.json", model_type="llava"), "llava"),
        (lambda d: _edit(d / "config.json", video_token_id=3), "video_token_id 3"),
        (lambda d: _edit(d / "preprocessor_config.json", patch_size=16), "patch_size 16"),
        (lambda d: (d / "streaming_config.json").write_text('{"sink": 3}'), "sink"),
        (lambda d: (d / "streaming_config.json").write_text("{"), "not valid JSON"),
        (lambda d: _scale_weight(d, "layers.1.mlp.up_proj.weight", np.nan), "model.layers.1"),
    ],
)
def test_bad_checkpoints_get_one_sentence(
    checkpoint: Path, tmp_path: Path, damage: object, words: str
) -> None:
    damage(checkpoint)  # type: ignore[operator]
    output = tmp_path / "out" / "bundle"
    assert words in _refusal(CheckpointError, checkpoint, output)


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judge": False, "gate": QualityGate(0.9, 0.1)}, "--no-gate contradicts"),
        ({"judge": False, "gate_checkpoint": Path("other")}, "--no-gate contradicts"),
        ({"max_patches": 4}, "--max-patches 4"),
        ({"max_prefill": 512, "max_context": 256}, "--max-prefill 512"),
    ],
)
def test_options_that_cannot_be(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    assert words in _refusal(BuildError, tiny_checkpoint, tmp_path / "bundle", **options)


def test_calibration_video_that_is_missing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    message = _refusal(
        VideoError,
        tiny_checkpoint,
        tmp_path / "bundle",
        calibration_videos=(tmp_path / "nothing.mp4",),
    )
    assert "nothing.mp4" in message


def test_a_weight_beyond_its_type_is_named(checkpoint: Path, tmp_path: Path) -> None:
    _scale_weight(checkpoint, "layers.1.mlp.up_proj.weight", 1e6)
    opened = Checkpoint.open(checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(BuildError, match=name):
        write_weights(opened, {name: "float16"}, tmp_path / "w.safetensors", lambda _: None)
    write_weights(opened, {name: "bfloat16"}, tmp_path / "w.safetensors", lambda _: None)


def test_a_small_machine_is_told_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framesink.build.pipeline.available_memory", lambda: 10**8)
    assert "0.1 GB are available" in _refusal(CapacityError, tiny_checkpoint, tmp_path / "bundle")
    monkeypatch.setattr("framesink.build.pipeline.available_memory", lambda: 10**11)
    monkeypatch.setattr("framesink.build.pipeline.free_disk", lambda _: 1000)
    assert "of disk" in _refusal(CapacityError, tiny_checkpoint, tmp_path / "bundle")


def test_without_a_builder_only_no_plans_works(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none: list[PlanBuilder] = []
    monkeypatch.setattr("framesink.build.plans.builder.find_builders", lambda: none)
    message = _refusal(BuildError, tiny_checkpoint, tmp_path / "bundle", plans=True)
    assert "pip install" in message
    _build(tiny_checkpoint, tmp_path / "bundle")
