"""Whether TensorRT-LLM reads a checkpoint, told from its small files before anything is loaded.

Source: TensorRT-LLM 1.2's reading of ModelOpt's unified layout (`hf_quant_config.json`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framesink.runtime.bundle import TOKENIZER_NAME, Bundle, hash_file
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import CONFIG_NAME, find_tensors, read_json
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.models.config import parse_config
from framesink.runtime.models.quantization import FLOAT_DTYPES, QUANTIZATION_NAME
from framesink.runtime.models.weights import canonical_name

DESCRIPTION_NAME = "hf_quant_config.json"
LAYER_CONFIG_NAME = "quant_cfg.json"
MIXED = "MIXED_PRECISION"
READABLE_ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_BLOCK_SCALES",
    "NVFP4",
    "W4A16",
    "W4A16_AWQ",
    "W4A8_AWQ",
    "W8A16",
)
READABLE_CACHES = ("FP8",)
QUANTIZE_HINT = (
    "make a readable one with: framesink calibrate MODEL_DIR -o DIR --precision fp8 "
    "--layout tensorrt-llm"
)
_VISION = "visual."


def require_readable(directory: Path) -> None:
    """Raise CheckpointError, in one sentence, unless TensorRT-LLM reads the checkpoint."""
    if not directory.is_dir():
        raise CheckpointError(f"There is no checkpoint directory {directory}.")
    companion_files(directory)
    code = sorted(path.name for path in directory.glob("*.py"))
    if code:
        raise CheckpointError(
            f"The checkpoint {directory} holds code ({code[0]}), which would be run when it is "
            "loaded; remove it, Qwen2.5-VL needs none."
        )
    own_layout = (directory / QUANTIZATION_NAME).exists()
    if (directory / DESCRIPTION_NAME).exists():
        _check_description(directory)
    elif own_layout and "quantization_config" in read_json(directory / CONFIG_NAME):
        raise CheckpointError(
            f"The checkpoint {directory} is quantized in framesink's own layout, which "
            f"TensorRT-LLM does not read; {QUANTIZE_HINT}."
        )
    _check_vision_encoder(directory)


def require_model_of(bundle: Bundle, directory: Path) -> None:
    """Raise CheckpointError unless a readable checkpoint is of the bundle's model: the same sizes,
    the same tokenizer."""
    if parse_config(read_json(directory / CONFIG_NAME)) != bundle.manifest.model:
        raise CheckpointError(
            f"The checkpoint {directory} is of another model than the bundle {bundle.directory}; "
            "give the one the bundle was built from."
        )
    if hash_file(directory / TOKENIZER_NAME) != bundle.manifest.files[TOKENIZER_NAME].sha256:
        raise CheckpointError(
            f"The checkpoint {directory} has another {TOKENIZER_NAME} than the bundle "
            f"{bundle.directory}; give the one the bundle was built from."
        )


def _check_description(directory: Path) -> None:
    path = directory / DESCRIPTION_NAME
    details = read_json(path).get("quantization")
    if not isinstance(details, dict):
        raise CheckpointError(f"{path} does not say what is quantized; {QUANTIZE_HINT}.")
    for algorithm in sorted(_algorithms(path, details)):
        if algorithm not in READABLE_ALGORITHMS:
            kind = "SmoothQuant" if algorithm.startswith("W8A8_SQ") else f"{algorithm[:64]!r}"
            raise CheckpointError(
                f"The checkpoint {directory} is quantized with {kind}, which TensorRT-LLM does not "
                f"read; {QUANTIZE_HINT}."
            )
    cache = details.get("kv_cache_quant_algo")
    if cache is not None and cache not in READABLE_CACHES:
        raise CheckpointError(
            f"The checkpoint {directory} asks for a K/V cache in {str(cache)[:64]!r}, which "
            f"TensorRT-LLM's PyTorch backend does not have; {QUANTIZE_HINT}."
        )


def _algorithms(path: Path, details: Mapping[str, Any]) -> set[str]:
    algorithm = details.get("quant_algo")
    if algorithm != MIXED:
        return set() if algorithm is None else {str(algorithm)}
    if not (path.parent / LAYER_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path} is of mixed precision, for which TensorRT-LLM wants {LAYER_CONFIG_NAME} "
            f"beside it; {QUANTIZE_HINT}."
        )
    layers = details.get("quantized_layers")
    if not isinstance(layers, dict) or not all(isinstance(v, dict) for v in layers.values()):
        raise CheckpointError(f"{path} does not say which layers are quantized; {QUANTIZE_HINT}.")
    return {str(layer.get("quant_algo")) for layer in layers.values()}


def _check_vision_encoder(directory: Path) -> None:
    """By what is stored, whatever the description says."""
    for name, info in find_tensors(directory).items():
        if canonical_name(name).startswith(_VISION) and info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"The vision encoder of the checkpoint {directory} is quantized ({name[:128]} is "
                f"{info.dtype}), which TensorRT-LLM does not load; {QUANTIZE_HINT}."
            )
