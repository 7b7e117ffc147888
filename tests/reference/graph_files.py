"""The graphs of a checkpoint on disk, next to its weights, without a bundle around them."""

import shutil
from pathlib import Path

import onnx_ir

from framesink.build.graphs.language_model import author_language_model
from framesink.build.graphs.layers import external_weights
from framesink.build.graphs.vision_encoder import author_vision_encoder
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import QUANTIZATION_NAME
from framesink.runtime.models.weights import EMBEDDING

LANGUAGE_MODEL = "language_model.onnx"
VISION_ENCODER = "vision_encoder.onnx"


def write_graphs(
    checkpoint: Path,
    directory: Path,
    *,
    compute_type: ComputeType,
    cache_type: ComputeType | None = None,
    page_size: int = 4,
) -> Checkpoint:
    """Copy the weights of a single-file checkpoint to `directory` and author both graphs there,
    quantized as the checkpoint is."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", QUANTIZATION_NAME):
        if (checkpoint / name).exists():
            shutil.copy(checkpoint / name, directory)
    opened = Checkpoint.open(directory)
    weights = external_weights(opened.tensors)
    language_model = author_language_model(
        opened.config,
        weights,
        compute_type=compute_type,
        page_size=page_size,
        cache_type=cache_type or compute_type,
        quantization=opened.quantization,
    )
    vision_encoder = author_vision_encoder(
        opened.config, weights, compute_type=compute_type, quantization=opened.quantization
    )
    onnx_ir.save(language_model, directory / LANGUAGE_MODEL)
    onnx_ir.save(vision_encoder, directory / VISION_ENCODER)
    return opened


def load_executor(directory: Path, *, num_pages: int) -> OnnxRuntimeExecutor:
    """An executor over what `write_graphs` wrote."""
    checkpoint = Checkpoint.open(directory)
    return OnnxRuntimeExecutor(
        checkpoint.config,
        language_model=directory / LANGUAGE_MODEL,
        vision_encoder=directory / VISION_ENCODER,
        embedding=checkpoint.read(EMBEDDING),
        num_pages=num_pages,
        threads=1,
    )
