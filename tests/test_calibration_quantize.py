"""Quantized checkpoints: what they hold, how near it is, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference.dense_model import load_model
from reference.observed_model import observe_model, video_prompt
from reference.quantized_checkpoint import load_quantized_model
from safetensors.numpy import load_file, save_file

from framesink.calibration import weight_blocks
from framesink.calibration.formats import FP8
from framesink.calibration.layouts import Layout
from framesink.calibration.observers import Observer
from framesink.calibration.quantize import QuantizeSummary, quantize_checkpoint
from framesink.calibration.recipe import Recipe
from framesink.calibration.statistics import Statistics
from framesink.runtime.errors import CheckpointError, OptionError, OutputError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme, LinearScheme
from framesink.runtime.models.weights import canonical_name

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

Quantize = Callable[..., tuple[Checkpoint, QuantizeSummary]]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint) -> Statistics:
    return observe(checkpoint)


@pytest.fixture
def quantize(checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path) -> Quantize:
    def run(recipe: Recipe, **options: Any) -> tuple[Checkpoint, QuantizeSummary]:
        output = tmp_path / "quantized"
        summary = quantize_checkpoint(checkpoint, statistics, recipe, output, **options)
        return Checkpoint.open(output), summary

    return run


def observe(checkpoint: Checkpoint) -> Statistics:
    import torch

    model = load_model(checkpoint.directory, torch.float32)
    return observe_model(model, checkpoint, video_prompt(model))


def both(precision: str, **settings: Any) -> Recipe:
    return Recipe(language_model=precision, vision_encoder=precision, **settings)


def codes_of(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    """The codes of a linear layer's weight; INT4's from the definition of their packing."""
    stored = np.asarray(checkpoint.read(f"{name}.weight"))
    if stored.dtype != np.uint8:
        return stored.astype(np.float64)
    nibbles = np.stack([stored % 16, stored // 16], axis=-1).reshape(len(stored), -1)
    return np.where(nibbles > 7, nibbles.astype(np.float64) - 16, nibbles)


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("fp8", Layout.FRAMESINK),
        ("fp8", Layout.MODELOPT),
        ("int8", Layout.MODELOPT),
        ("int8-weight-only", Layout.FRAMESINK),
        ("int4-weight-only", Layout.FRAMESINK),
    ],
)
def test_weights_are_within_half_a_step_of_the_16_bit_ones(
    precision: str, layout: Layout, checkpoint: Checkpoint, quantize: Quantize
) -> None:
    quantized, summary = quantize(both(precision), layout=layout)
    quantization = quantized.quantization
    assert quantization is not None
    assert sum(summary.linears.values()) == len(quantization.linears) == 36
    for name, scheme in quantization.linears.items():
        weight = np.asarray(checkpoint.read(f"{name}.weight")).astype(np.float64)
        if scheme is LinearScheme.INT8:
            weight = weight / quantized.read(f"{name}.pre_quant_scale")
        codes = codes_of(quantized, name)
        scale = np.asarray(quantized.read(f"{name}.weight_scale")).astype(np.float64)
        step = scale.repeat(128, axis=1) if scale.ndim == 2 else scale.reshape(-1, 1)
        if scheme is LinearScheme.FP8:
            # Neighbours are 2⁻³ of their power of two apart, below 2⁻⁶ 2⁻⁹.
            exponent = np.floor(np.log2(np.maximum(np.abs(codes), 2.0**-6)))
            half = 0.5 * 2.0 ** (exponent - 3)
        else:
            half = np.full_like(codes, 0.5)
        assert np.all(np.abs(codes * step - weight) <= 1.0001 * half * step), name
        # All of the format is used.
        largest = {LinearScheme.FP8: 448, LinearScheme.INT4_WEIGHT_ONLY: 7}.get(scheme, 127)
        assert np.abs(codes).max() == largest


@pytest.mark.parametrize(
    ("precision", "cache", "layout", "allowed"),
    [
        ("fp8", "fp16", Layout.FRAMESINK, 0.2),
        ("fp8", "fp8", Layout.FRAMESINK, 0.2),
        ("fp8", "fp16", Layout.TENSORRT_LLM, 0.2),
        ("int8", "fp16", Layout.FRAMESINK, 0.06),
        ("int8", "int8", Layout.FRAMESINK, 0.06),
        ("int8", "fp16", Layout.MODELOPT, 0.06),
        ("int8-weight-only", "fp16", Layout.FRAMESINK, 0.04),
        ("int4-weight-only", "fp16", Layout.FRAMESINK, 0.2),
    ],
)
def test_the_quantized_model_says_nearly_what_the_16_bit_one_says(
    precision: str,
    cache: str,
    layout: Layout,
    allowed: float,
    checkpoint: Checkpoint,
    tiny_model: "Qwen2_5_VLForConditionalGeneration",
    quantize: Quantize,
) -> None:
    """Against transformers in float64 with inputs, weights and K/V rounded by the definition."""
    import torch

    quantized, _ = quantize(both(precision, kv_cache=cache), layout=layout)
    model = load_quantized_model(checkpoint.directory, quantized.directory)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name = canonical_name(path)
            if "norm" in name:  # where SmoothQuant's factors may be
                norm = np.asarray(quantized.read(name)).astype(np.float64)
                parameter.copy_(torch.from_numpy(norm))
        inputs = video_prompt(model)  # what was calibrated on: so short a prompt covers no other
        found, expected = model(**inputs).logits, tiny_model(**inputs).logits
    error = float((found - expected).norm() / expected.norm())
    assert 1e-5 < error < allowed


@pytest.mark.parametrize(
    ("cache", "key_headroom", "value_headroom"), [("int8", 1.5, 1.0), ("fp8", 2.0, 2.0)]
)
def test_cache_scales_reach_beyond_what_was_seen(
    cache: str,
    key_headroom: float,
    value_headroom: float,
    checkpoint: Checkpoint,
    statistics: Statistics,
    quantize: Quantize,
) -> None:
    quantized, summary = quantize(Recipe(kv_cache=cache))
    assert summary.cache is CacheScheme(cache)
    largest = {"int8": 127, "fp8": 448}[cache]
    for index, layer in enumerate(statistics.layers):
        attention = f"model.layers.{index}.self_attn"
        for name, amax in (
            ("k_proj.k_channel_scale", key_headroom * layer.key_channel_amax),
            ("k_proj.k_pair_scale", key_headroom * layer.key_pair_amax),
            ("v_proj.v_head_scale", value_headroom * layer.value_head_amax),
        ):
            scale = quantized.read(f"{attention}.{name}")
            np.testing.assert_allclose(scale * np.float32(largest), amax, rtol=1e-6)
    # Nothing else has changed.
    for name in checkpoint.names():
        np.testing.assert_array_equal(quantized.read(name), checkpoint.read(name))


def test_the_file_does_not_depend_on_how_it_was_blocked(
    checkpoint: Checkpoint,
    statistics: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe(language_model="int8", vision_encoder="fp8", overrides={"lm_head": "fp8"})
    files = []
    for elements in (1 << 22, 100):
        monkeypatch.setattr(weight_blocks, "_BLOCK_ELEMENTS", elements)
        for layout in (Layout.FRAMESINK, Layout.MODELOPT):
            output = tmp_path / f"{elements}-{layout}"
            quantize_checkpoint(checkpoint, statistics, recipe, output, layout=layout)
            files.append((output / "model.safetensors").read_bytes())
    assert files[:2] == files[2:]


def test_progress_rises_to_one(quantize: Quantize) -> None:
    shares: list[float] = []
    quantize(both("int8"), on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_what_lies_beside_the_weights_comes_along(
    checkpoint: Checkpoint, tmp_path: Path, statistics: Statistics
) -> None:
    source = copy_of(checkpoint, tmp_path / "source")
    (source / "streaming_config.json").write_text('{"fps": 2.0}')
    output = tmp_path / "quantized"
    quantize_checkpoint(Checkpoint.open(source), statistics, both("fp8"), output)
    for name in ("tokenizer.json", "generation_config.json", "streaming_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "framesink"}
    assert config == json.loads((source / "config.json").read_text())


def copy_of(checkpoint: Checkpoint, directory: Path) -> Path:
    directory.mkdir()
    for file in checkpoint.directory.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def edit_weights(directory: Path, edits: dict[str, Callable[[NDArray[Any]], None]]) -> Checkpoint:
    """Change weights of a checkpoint in place, by their canonical names."""
    path = directory / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    for name, value in tensors.items():
        edits.get(canonical_name(name), lambda _: None)(value)
    save_file(tensors, path, metadata={"format": "pt"})
    return Checkpoint.open(directory)


def test_dead_channels_are_clamped_and_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def clear_row(value: NDArray[Any]) -> None:
        value[3] = 0.0

    layer = "model.layers.0"
    damaged = edit_weights(
        copy_of(checkpoint, tmp_path / "source"),
        {
            f"{layer}.input_layernorm.weight": clear_row,
            f"{layer}.mlp.up_proj.weight": clear_row,
            f"{layer}.self_attn.k_proj.weight": clear_row,
        },
    )
    for precision in ("fp8", "int8"):
        output = tmp_path / precision
        recipe = Recipe(language_model=precision, kv_cache="int8")
        summary = quantize_checkpoint(damaged, observe(damaged), recipe, output)
        assert summary.dead_rows == 2  # of up_proj and k_proj
        assert summary.dead_inputs == 2  # of q/k/v, and of down_proj
        assert summary.dead_cache == 1  # that channel of K
        quantized = Checkpoint.open(output)  # which refuses scales of 0
        codes = codes_of(quantized, f"{layer}.mlp.up_proj")
        assert not codes[3].any()
        assert np.isfinite(codes).all()


def test_a_damaged_weight_is_named(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    def poison(value: NDArray[Any]) -> None:
        value[2, 5] = np.nan

    name = "model.layers.1.mlp.gate_proj.weight"
    damaged = edit_weights(copy_of(checkpoint, tmp_path / "source"), {name: poison})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        quantize_checkpoint(damaged, None, both("int8-weight-only"), tmp_path / "quantized")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_int4_that_does_not_fit_is_told(quantize: Quantize) -> None:
    quantized, summary = quantize(Recipe(language_model="int4-weight-only"))
    assert summary.linears == {
        LinearScheme.INT4_WEIGHT_ONLY: 3,
        LinearScheme.INT8_WEIGHT_ONLY: 18,
    }
    ((reason, names),) = summary.replaced.items()
    assert "no multiple of INT4's group of 128" in reason
    assert len(names) == 18
    assert quantized.read("model.layers.0.mlp.down_proj.weight").shape == (64, 64)
    assert summary.bytes_after < summary.bytes_before


def test_tensorrt_llm_gets_nothing_it_cannot_read(quantize: Quantize) -> None:
    recipe = both("fp8", kv_cache="int8", overrides={"model.layers.1.*": "int8", "lm_head": "fp16"})
    quantized, summary = quantize(recipe, layout=Layout.TENSORRT_LLM)
    assert summary.linears == {LinearScheme.FP8: 14}
    assert summary.cache is CacheScheme.UNQUANTIZED
    told = {name: reason for reason, names in summary.replaced.items() for name in names}
    assert "SmoothQuant" in told["model.layers.1.mlp.up_proj"]
    assert "vision encoder" in told["visual.blocks.0.attn.qkv"]
    assert "INT8 K/V cache" in told["K/V cache"]
    assert len(told) == 7 + 15 + 1
    description = json.loads((quantized.directory / "hf_quant_config.json").read_text())
    assert description["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head", "model.embed_tokens", "model.layers.1*", "visual*"],
    }
    assert quantized.info("model.layers.1.mlp.up_proj.weight").dtype == "float32"
    assert quantized.info("visual.blocks.0.attn.qkv.weight").dtype == "float32"


def test_observers_choose_input_ranges(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    scales = {}
    for observer in Observer:
        output = tmp_path / observer
        quantize_checkpoint(checkpoint, statistics, both("fp8"), output, observer=observer)
        quantized = Checkpoint.open(output)
        names = quantized.quantization.linears if quantized.quantization else ()
        scales[observer] = [float(quantized.read(f"{name}.input_scale")) for name in names]
        expected = [statistics.input_amax(name, observer, FP8) / 448 for name in names]
        assert scales[observer] == pytest.approx(expected)
    assert scales[Observer.MSE] != scales[Observer.ABSMAX]


def test_what_cannot_be_quantized_is_refused(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    output = tmp_path / "quantized"
    with pytest.raises(OptionError, match="need calibration statistics"):
        quantize_checkpoint(checkpoint, None, both("fp8"), output)
    with pytest.raises(OptionError, match="need calibration statistics"):
        quantize_checkpoint(checkpoint, None, Recipe(kv_cache="int8"), output)

    def change(value: NDArray[Any]) -> None:
        value += 0.25

    other = edit_weights(copy_of(checkpoint, tmp_path / "other"), {"lm_head.weight": change})
    with pytest.raises(CheckpointError, match="those of another checkpoint"):
        quantize_checkpoint(other, statistics, both("fp8"), output)

    quantize_checkpoint(checkpoint, None, both("int8-weight-only"), output)
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists; pass --force"):
        quantize_checkpoint(checkpoint, statistics, both("fp8"), output)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(Checkpoint.open(output), statistics, both("fp8"), tmp_path / "twice")
    with pytest.raises(OutputError, match="no quantized checkpoint"):
        quantize_checkpoint(checkpoint, statistics, both("fp8"), tmp_path / "other", force=True)
    assert (output / "model.safetensors").read_bytes() == before
    quantize_checkpoint(checkpoint, statistics, both("fp8"), output, force=True)
    assert (output / "model.safetensors").read_bytes() != before
