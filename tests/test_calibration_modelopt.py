"""Quantized checkpoints against what nvidia-modelopt exports of the same model.

Both see the same forward. Driven as in NVIDIA's examples: quantize with a forward loop, then
`export_hf_checkpoint`.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference.dense_model import load_model
from reference.observed_model import observe_model, video_prompt

from framesink.calibration.layouts import MODELOPT_QUANTIZATION_NAME, Layout
from framesink.calibration.quantize import quantize_checkpoint
from framesink.calibration.recipe import CachePrecision, LinearPrecision, Recipe
from framesink.calibration.statistics import Statistics
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.safetensors import read_header, read_tensor

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

MODELOPT_MISSING = "nvidia-modelopt is not installed (pip install nvidia-modelopt)"
# What it says of layers it was told to leave alone.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:modelopt")
Tensors = dict[str, NDArray[np.generic]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> "Qwen2_5_VLForConditionalGeneration":
    import torch

    return load_model(tiny_checkpoint, torch.float32)


@pytest.fixture(scope="module")
def statistics(tiny_checkpoint: Path, model: "Qwen2_5_VLForConditionalGeneration") -> Statistics:
    return observe_model(model, Checkpoint.open(tiny_checkpoint), video_prompt(model))


def export_by_modelopt(
    model: "Qwen2_5_VLForConditionalGeneration",
    output: Path,
    config_name: str,
    *,
    vision: bool,
    cache: str | None,
) -> None:
    pytest.importorskip("modelopt", reason=MODELOPT_MISSING)
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    config = copy.deepcopy(getattr(mtq, config_name))
    rules: list[dict[str, Any]] = config["quant_cfg"]
    if vision:
        rules = [rule for rule in rules if "visual" not in rule["quantizer_name"]]
    if cache is not None:
        rules += getattr(mtq, cache)["quant_cfg"]
        # Its pattern for K and V matches the vision encoder's attention too, which caches nothing.
        rules.append({"quantizer_name": "*visual*bmm_quantizer", "enable": False})
    config["quant_cfg"] = rules

    def show(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model(**video_prompt(quantized))

    quantized = copy.deepcopy(model)
    export_hf_checkpoint(mtq.quantize(quantized, config, show), export_dir=str(output))


def read_tensors(directory: Path) -> Tensors:
    header = read_header(directory / "model.safetensors")
    return {name: read_tensor(info) for name, info in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize(
    ("config_name", "precision", "vision", "cache"),
    [
        ("FP8_DEFAULT_CFG", "fp8", False, "fp8"),
        ("FP8_DEFAULT_CFG", "fp8", True, "fp16"),
        ("INT8_SMOOTHQUANT_CFG", "int8", False, "fp16"),
        ("INT8_SMOOTHQUANT_CFG", "int8", True, "fp16"),
    ],
    ids=["fp8-kv-fp8", "fp8-vision", "int8", "int8-vision"],
)
def test_the_checkpoint_is_what_modelopt_exports(
    config_name: str,
    precision: LinearPrecision,
    vision: bool,
    cache: CachePrecision,
    tiny_checkpoint: Path,
    model: "Qwen2_5_VLForConditionalGeneration",
    statistics: Statistics,
    tmp_path: Path,
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    kv_config = "FP8_KV_CFG" if cache == "fp8" else None
    export_by_modelopt(model, theirs, config_name, vision=vision, cache=kv_config)
    recipe = Recipe(
        language_model=precision,
        vision_encoder=precision if vision else "fp16",
        kv_cache=cache,
        smoothquant_alpha=1.0,  # ModelOpt's default
        overrides={"visual.merger.*": precision} if vision else {},
    )
    quantize_checkpoint(
        Checkpoint.open(tiny_checkpoint), statistics, recipe, ours, layout=Layout.MODELOPT
    )

    found, expected = read_tensors(ours), read_tensors(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        if name.endswith("_scale"):
            np.testing.assert_allclose(found[name], value, rtol=0.01, err_msg=name)
        elif value.dtype == np.float32:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert_same_weight(name, found, expected)
    for file, key in ((MODELOPT_QUANTIZATION_NAME, None), ("config.json", "quantization_config")):
        mine, other = read_json(ours / file), read_json(theirs / file)
        assert (mine if key is None else mine[key]) == (other if key is None else other[key])


def assert_same_weight(name: str, found: Tensors, expected: Tensors) -> None:
    """Codes differ by one step at most, where a scale's last bit decides, and seldom."""
    codes = [tensors[name].astype(np.float32) for tensors in (found, expected)]
    distance = np.abs(codes[0] - codes[1])
    assert np.mean(distance > 0) < 0.01, name
    assert np.all(distance <= np.maximum(1.0, np.abs(codes[1]) / 7.9)), name


def test_the_description_of_a_mixed_checkpoint_is_modelopts(
    tiny_checkpoint: Path,
    model: "Qwen2_5_VLForConditionalGeneration",
    statistics: Statistics,
    tmp_path: Path,
) -> None:
    pytest.importorskip("modelopt", reason=MODELOPT_MISSING)
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import process_layer_quant_config

    recipe = Recipe(
        language_model="fp8",
        vision_encoder="int8-weight-only",
        overrides={"model.layers.1.mlp.*": "int8", "model.layers.2.*": "fp16"},
    )
    checkpoint = Checkpoint.open(tiny_checkpoint)
    quantize_checkpoint(checkpoint, statistics, recipe, tmp_path / "ours", layout=Layout.MODELOPT)
    kinds = {"fp8": "fp8", "int8": "int8_sq", "int8-weight-only": "int8_wo", "fp16": None}
    layers = {
        f"{name}.quantization": kinds[precision]
        for name, precision in recipe.precisions(checkpoint.config).items()
    }
    expected = process_layer_quant_config(layers)
    ours = read_json(tmp_path / "ours" / MODELOPT_QUANTIZATION_NAME)
    assert ours["quantization"] == expected
    entry = read_json(tmp_path / "ours" / "config.json")["quantization_config"]
    assert entry == convert_hf_quant_config_format(ours)
