"""What a build will take, from the sizes alone, before anything is done."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from framesink.runtime.errors import CapacityError
from framesink.runtime.manifest import PART_NAMES, PartName
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import (
    LinearScheme,
    Quantization,
    linear_tensors,
    quantizable_linears,
)
from framesink.runtime.models.safetensors_writer import numpy_type
from framesink.runtime.models.weights import (
    EMBEDDING,
    Shape,
    language_model_weights,
    model_weights,
    output_projection,
    vision_encoder_weights,
)

HALF_BYTES = 2
FLOAT_BYTES = 4
# Measured with TensorRT-RTX 1.7 (docs/performance.md, "Building engines"): 0.2 GB for the libraries
# and 1.5 to 1.7 times the weights of the part that is compiled. The weights themselves are mapped
# from their file on top of that; the system takes those pages back when it needs them.
COMPILER_BASE_BYTES = 350_000_000
COMPILER_BYTES_PER_WEIGHT_BYTE = 2.0
# The Python process with numpy, ONNX and its graphs.
PROCESS_BASE_BYTES = 250_000_000
# A weight in float32 while it is observed: the matrix itself and its transposed or squared copy.
OBSERVED_COPIES = 2
# torch and its libraries; up to this many bytes it keeps weights in float32, of a larger model only
# the one in use (calibration/torch_weights.py).
TORCH_BASE_BYTES = 700_000_000
TORCH_KEPT_BYTES = 2_000_000_000
# Blocks of rows in float32 and as codes, in a process that has loaded torch.
QUANTIZING_BYTES = TORCH_BASE_BYTES + 300_000_000
# Up to this many bytes of 16-bit weights ONNX Runtime computes in float32: it is faster on a CPU,
# but takes the weights' size twice over in memory.
FLOAT32_WEIGHT_LIMIT = 2_000_000_000
# While it loads a graph ONNX Runtime holds each weight in the compute type twice, quantized or not:
# a model of 0.5 billion weights took 4.3 GB in float32, and 2.1 GB afterwards.
EXECUTED_COPIES = 2
OBSERVED_TOKENS = 1024
ACTIVATION_COPIES = 6


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage of a build: its peak memory, and what it adds on disk (below 0: removes), in bytes;
    and what to do to leave it out, if that is possible."""

    name: str
    memory: int
    disk: int
    without: str | None = None


@dataclass(frozen=True, slots=True)
class BuildEstimate:
    """All stages of a build; they run one after another, each giving its memory back."""

    stages: tuple[StageEstimate, ...]

    @property
    def memory(self) -> int:
        """Peak memory of the whole build in bytes."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Most bytes on disk at any time."""
        return max(accumulate(stage.disk for stage in self.stages))

    def check(self, *, available_memory: int, free_disk: int) -> None:
        """Raises CapacityError, with the figures, if the machine cannot carry the build."""
        largest = max(self.stages, key=lambda stage: stage.memory)
        if largest.memory > available_memory:
            remedy = "use a machine with more" + (f", or {largest.without}" * bool(largest.without))
            raise CapacityError(
                f"The build needs about {_gigabytes(largest.memory)} of memory (stage: "
                f"{largest.name}) and {_gigabytes(available_memory)} are available; {remedy}."
            )
        if self.disk > free_disk:
            raise CapacityError(
                f"The build needs about {_gigabytes(self.disk)} of disk and "
                f"{_gigabytes(free_disk)} are free; make room, or write it elsewhere."
            )


def estimate_build(
    config: ModelConfig,
    *,
    observe: bool,
    plans: bool,
    quantization: Quantization | None = None,
    quantize: bool = False,
    calibrate: bool = False,
    compare: bool = False,
    gate: bool = False,
    carried: Quantization | None = None,
    context: int = 0,
) -> BuildEstimate:
    """Estimate each stage of the build of a model of these sizes.

    `observe` and `plans` say whether activations are observed and plans compiled, `quantize`
    whether the checkpoint has to be quantized first and `calibrate` whether on video, `compare`
    whether all precisions are measured, `gate` whether the bundle is. `carried` is what is
    quantized in the checkpoint that the bundle carries, if it carries one. `context` is the longest
    context of a stream in tokens.
    """
    quantization = quantization or Quantization()
    weights = weight_bytes(config, model_weights(config), quantization)
    stages = []
    if observe:
        stages.append(StageEstimate("observe activations", _observation_memory(config), 0))
    if calibrate:
        stages.append(StageEstimate("calibrate", _torch_memory(config, context), 0))
    if compare:
        # The weights that are simulated are kept beside those they were made from.
        memory = _torch_memory(config, context) + _kept_bytes(config)
        stages.append(StageEstimate("compare precisions", memory, 0, "do without --compare"))
    if quantize:
        stages.append(StageEstimate("quantize", QUANTIZING_BYTES, weights))
    stages.append(StageEstimate("write weights", PROCESS_BASE_BYTES, weights))
    # The quantized checkpoint goes when its weights are in the bundle.
    stages.append(
        StageEstimate("author graphs", 2 * PROCESS_BASE_BYTES, -weights if quantize else 0)
    )
    if carried is not None:
        size = weight_bytes(config, model_weights(config), carried)
        advice = "do without --with-checkpoint"
        stages.append(StageEstimate("write checkpoint", QUANTIZING_BYTES, size, advice))
    if gate:
        stages.append(
            StageEstimate("quality gate", _gate_memory(config, context), 0, "pass --no-gate")
        )
    if plans:
        for part, size in compiled_bytes(config, quantization).items():
            memory = COMPILER_BASE_BYTES + int(COMPILER_BYTES_PER_WEIGHT_BYTE * size)
            stages.append(
                StageEstimate(
                    f"compile {part}", memory + PROCESS_BASE_BYTES, size, "pass --no-plans"
                )
            )
    return BuildEstimate(tuple(stages))


def compiled_bytes(
    config: ModelConfig, quantization: Quantization | None = None
) -> dict[PartName, int]:
    """Bytes of the weights inside each part's graph, those of 16 bits where none is quantized."""
    quantization = quantization or Quantization()
    return {
        part: weight_bytes(config, _graph_shapes(config, part), quantization) for part in PART_NAMES
    }


def graph_weights(config: ModelConfig, part: PartName) -> int:
    """How many weights are inside a part's graph."""
    return _elements(_graph_shapes(config, part))


def _graph_shapes(config: ModelConfig, part: PartName) -> dict[str, Shape]:
    """The weights inside a part's graph: tokens are embedded outside of it."""
    if part == "vision_encoder":
        return vision_encoder_weights(config.vision)
    shapes = language_model_weights(config.text)
    if output_projection(config.text) != EMBEDDING:
        del shapes[EMBEDDING]
    return shapes


def weight_bytes(
    config: ModelConfig, shapes: Mapping[str, Shape], quantization: Quantization
) -> int:
    """Bytes of some weights as they are stored: codes and scales where they are quantized, two
    bytes each where they are not."""
    linears = {f"{name}.weight": name for name in quantizable_linears(config)}
    total = 0
    for name, shape in shapes.items():
        scheme = quantization.scheme(linears.get(name, ""))
        if scheme is LinearScheme.UNQUANTIZED:
            total += HALF_BYTES * math.prod(shape)
            continue
        for rule in linear_tensors(linears[name], scheme, shape, quantization.int4_group).values():
            total += math.prod(rule.shapes[0]) * numpy_type(rule.dtypes[0]).itemsize
    return total


def _observation_memory(config: ModelConfig) -> int:
    shapes = model_weights(config)
    for name in (EMBEDDING, output_projection(config.text)):
        shapes.pop(name, None)  # read by rows and in blocks
    largest = max(math.prod(shape) for shape in shapes.values())
    return PROCESS_BASE_BYTES + FLOAT_BYTES * OBSERVED_COPIES * largest + _activation_bytes(config)


def _torch_memory(config: ModelConfig, context: int) -> int:
    largest = FLOAT_BYTES * max(math.prod(shape) for shape in model_weights(config).values())
    kept = _kept_bytes(config) or largest
    return TORCH_BASE_BYTES + kept + _page_bytes(config, context) + _activation_bytes(config)


def _kept_bytes(config: ModelConfig) -> int:
    """What torch keeps of the weights: all of a small model's, none of a large one's."""
    whole = FLOAT_BYTES * _elements(model_weights(config))
    return whole if whole <= TORCH_KEPT_BYTES else 0


def _gate_memory(config: ModelConfig, context: int) -> int:
    weights = sum(graph_weights(config, part) for part in PART_NAMES)
    small = HALF_BYTES * weights <= FLOAT32_WEIGHT_LIMIT
    executed = (FLOAT_BYTES if small else HALF_BYTES) * weights
    pages = _page_bytes(config, context)
    return _torch_memory(config, context) + EXECUTED_COPIES * executed + pages


def _page_bytes(config: ModelConfig, context: int) -> int:
    """K/V rows of one stream in float32."""
    text = config.text
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return FLOAT_BYTES * row * context


def _activation_bytes(config: ModelConfig) -> int:
    widest = max(config.text.intermediate_size, config.vision.intermediate_size)
    return FLOAT_BYTES * ACTIVATION_COPIES * OBSERVED_TOKENS * widest


def _elements(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
