"""How ONNX Runtime is told to run a bundle's graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from framesink.runtime.errors import BundleError

DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int8)": np.dtype(np.int8),
}
LOG_ERRORS_ONLY = 3


@dataclass(frozen=True, slots=True)
class GraphInMemory:
    """An ONNX graph that no file holds; the files of its weights lie in the directory `weights`."""

    name: str
    content: bytes
    weights: Path


def load_graph(graph: Path | GraphInMemory, threads: int | None) -> onnxruntime.InferenceSession:
    """An ONNX graph, ready to run on the CPU with so many threads for an operator (None: one per
    physical core). Raises BundleError if it does not load."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = LOG_ERRORS_ONLY
    # Threads that wait must not burn the cores that capture and the terminal need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # One remembered allocation plan per combination of lengths would grow without end.
    options.enable_mem_pattern = False
    # Its own rewriting of QuantizeLinear and DequantizeLinear fails on FP8 and changes results;
    # without it quantized weights become numbers once, at load, and not in every step.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    model: Path | bytes
    if isinstance(graph, GraphInMemory):
        model = graph.content
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(graph.weights)
        )
    else:
        model = graph
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        reason = str(error).strip().splitlines()[0]
        raise BundleError(f"ONNX Runtime cannot load {graph.name}: {reason}") from error


def input_dtype(session: onnxruntime.InferenceSession, name: str) -> np.dtype[Any]:
    """The numpy type of a graph input. Raises BundleError for one a CPU cannot compute in."""
    kind = next(value.type for value in session.get_inputs() if value.name == name)
    if kind not in DTYPES:
        raise BundleError(
            f"The executed graph takes {kind} for {name}, which ONNX Runtime cannot compute on a "
            "CPU; build the bundle again."
        )
    return DTYPES[kind]
