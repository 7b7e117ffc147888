"""A bundle's language model over K/V that is not quantized: what codes of K/V are held against."""

from dataclasses import replace

import onnx_ir

from framesink.build.graphs.language_model import author_language_model
from framesink.build.graphs.layers import external_weights
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.onnx_graph import GraphInMemory
from framesink.runtime.models.quantization import (
    QUANTIZATION_NAME,
    CacheScheme,
    Quantization,
    read_quantization,
)
from framesink.runtime.models.safetensors import TensorInfo, read_header


def author_unquantized_cache(bundle: Bundle) -> GraphInMemory:
    """The graph that ONNX Runtime executes, authored anew over the bundle's own weights with pages
    of its compute type. Nothing is written.

    Raises BundleError if the bundle does not say how its weights are quantized, CheckpointError for
    a description or weights that cannot be read.
    """
    manifest = bundle.manifest
    quantization = read_quantization(bundle.path(QUANTIZATION_NAME).parent) or Quantization()
    tensors: dict[str, TensorInfo] = {}
    for file in manifest.weights:
        tensors |= read_header(bundle.path(file))
    compute_type = manifest.language_model.executed.compute_type
    model = author_language_model(
        manifest.model,
        external_weights(tensors),
        compute_type=compute_type,
        page_size=manifest.page_size,
        cache_type=compute_type,
        quantization=replace(quantization, cache=CacheScheme.UNQUANTIZED),
    )
    content: bytes = onnx_ir.to_proto(model).SerializeToString()
    return GraphInMemory(model.graph.name or "", content, bundle.directory)
