"""Which checkpoints are handed to TensorRT-LLM, and which are refused before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from framesink.calibration.layouts import Layout
from framesink.calibration.quantize import quantize_checkpoint
from framesink.calibration.recipe import Recipe
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CheckpointError
from framesink.runtime.executors.tensorrt_llm.checkpoint import (
    DESCRIPTION_NAME,
    LAYER_CONFIG_NAME,
    require_model_of,
    require_readable,
)
from framesink.runtime.models.checkpoint import Checkpoint

COMMAND = r"framesink calibrate MODEL_DIR -o DIR --precision fp8 --layout tensorrt-llm"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check="sizes")


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def quantized(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny checkpoint with weights in INT8 alone, which needs no calibration."""

    def make(layout: Layout, *, vision: bool = False) -> Path:
        recipe = Recipe(
            language_model="int8-weight-only",
            vision_encoder="int8-weight-only" if vision else "fp16",
        )
        output = tmp_path / layout.value
        quantize_checkpoint(Checkpoint.open(tiny_checkpoint), None, recipe, output, layout=layout)
        return output

    return make


def describe(directory: Path, **quantization: Any) -> Path:
    (directory / DESCRIPTION_NAME).write_text(json.dumps({"quantization": quantization}))
    return directory


def test_a_16_bit_checkpoint_is_read(tiny_checkpoint: Path, bundle: Bundle) -> None:
    require_readable(tiny_checkpoint)
    require_model_of(bundle, tiny_checkpoint)


def test_what_calibrate_writes_for_it_is_read(
    quantized: Callable[..., Path], bundle: Bundle
) -> None:
    """The layout leaves in 16-bit what cannot be read, the vision encoder first of all."""
    checkpoint = quantized(Layout.TENSORRT_LLM, vision=True)
    require_readable(checkpoint)
    require_model_of(bundle, checkpoint)


def test_framesinks_own_layout_is_refused(quantized: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"framesink's own layout.*{COMMAND}"):
        require_readable(quantized(Layout.FRAMESINK))


def test_a_quantized_vision_encoder_is_refused(quantized: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)vision encoder .* is int8.*{COMMAND}"):
        require_readable(quantized(Layout.MODELOPT, vision=True))


@pytest.mark.parametrize("algorithm", ["W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN"])
def test_smoothquant_is_refused(copy: Path, algorithm: str) -> None:
    with pytest.raises(CheckpointError, match=rf"with SmoothQuant, .*{COMMAND}"):
        require_readable(describe(copy, quant_algo=algorithm))


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_BLOCK_SCALES", "NVFP4", "W4A8_AWQ", None])
def test_algorithms_it_reads(copy: Path, algorithm: str | None) -> None:
    require_readable(describe(copy, quant_algo=algorithm, kv_cache_quant_algo="FP8"))


def test_one_layer_of_a_mixture_is_enough(copy: Path) -> None:
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}
    describe(copy, quant_algo="MIXED_PRECISION", quantized_layers=layers)
    with pytest.raises(CheckpointError, match=rf"wants {LAYER_CONFIG_NAME} beside it"):
        require_readable(copy)
    (copy / LAYER_CONFIG_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match="with SmoothQuant"):
        require_readable(copy)
    del layers["b"]
    require_readable(describe(copy, quant_algo="MIXED_PRECISION", quantized_layers=layers))


def test_an_int8_cache_is_refused(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="a K/V cache in 'INT8'"):
        require_readable(describe(copy, quant_algo="FP8", kv_cache_quant_algo="INT8"))


@pytest.mark.parametrize("content", ["[]", "{", '{"quantization": 3}', ""])
def test_a_malformed_description_is_a_sentence(copy: Path, content: str) -> None:
    (copy / DESCRIPTION_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=DESCRIPTION_NAME):
        require_readable(copy)


def test_another_model_is_refused(copy: Path, bundle: Bundle) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another model than the bundle"):
        require_model_of(bundle, copy)


def test_another_tokenizer_is_refused(copy: Path, bundle: Bundle) -> None:
    with (copy / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"another tokenizer\.json than the bundle"):
        require_model_of(bundle, copy)


def test_code_and_pickles_are_refused(copy: Path) -> None:
    (copy / "modeling.py").write_text("")
    with pytest.raises(CheckpointError, match=r"holds code \(modeling\.py\)"):
        require_readable(copy)
    (copy / "modeling.py").unlink()
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        require_readable(copy)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint directory"):
        require_readable(tmp_path / "none")
