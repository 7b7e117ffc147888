"""What a build will take, from the sizes alone, before anything is done."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from framesink.runtime.errors import CapacityError
from framesink.runtime.manifest import PartName
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.weights import (
    EMBEDDING,
    Shape,
    language_model_weights,
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
OBSERVED_TOKENS = 1024
ACTIVATION_COPIES = 6


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage of a build: its peak memory, and what it leaves on disk, in bytes."""

    name: str
    memory: int
    disk: int


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
        """Bytes of the finished bundle."""
        return sum(stage.disk for stage in self.stages)

    def check(self, *, available_memory: int, free_disk: int) -> None:
        """Raises CapacityError, with the figures, if the machine cannot carry the build."""
        largest = max(self.stages, key=lambda stage: stage.memory)
        if largest.memory > available_memory:
            raise CapacityError(
                f"The build needs about {_gigabytes(largest.memory)} of memory (stage: "
                f"{largest.name}) and {_gigabytes(available_memory)} are available; use a machine "
                "with more, or --no-plans."
            )
        if self.disk > free_disk:
            raise CapacityError(
                f"The bundle needs about {_gigabytes(self.disk)} of disk and "
                f"{_gigabytes(free_disk)} are free; make room, or write it elsewhere."
            )


def estimate_build(config: ModelConfig, *, observe: bool, plans: bool) -> BuildEstimate:
    """Estimate each stage of a 16-bit build of a model of these sizes.

    `observe` and `plans` say whether activations are observed and plans compiled.
    """
    language, vision = language_model_weights(config.text), vision_encoder_weights(config.vision)
    weights = HALF_BYTES * (_elements(language) + _elements(vision))
    stages = []
    if observe:
        stages.append(StageEstimate("observe activations", _observation_memory(config), 0))
    stages.append(StageEstimate("write weights", PROCESS_BASE_BYTES, weights))
    stages.append(StageEstimate("author graphs", 2 * PROCESS_BASE_BYTES, 0))
    if plans:
        for part, size in compiled_bytes(config).items():
            memory = COMPILER_BASE_BYTES + int(COMPILER_BYTES_PER_WEIGHT_BYTE * size)
            stages.append(StageEstimate(f"compile {part}", memory + PROCESS_BASE_BYTES, size))
    return BuildEstimate(tuple(stages))


def compiled_bytes(config: ModelConfig) -> dict[PartName, int]:
    """Bytes of the 16-bit weights inside each part's graph."""
    language = language_model_weights(config.text)
    inside = {
        name: shape
        for name, shape in language.items()
        if name != EMBEDDING or output_projection(config.text) == EMBEDDING
    }
    return {
        "vision_encoder": HALF_BYTES * _elements(vision_encoder_weights(config.vision)),
        "language_model": HALF_BYTES * _elements(inside),
    }


def _observation_memory(config: ModelConfig) -> int:
    shapes = {
        **language_model_weights(config.text),
        **vision_encoder_weights(config.vision),
    }
    for name in (EMBEDDING, output_projection(config.text)):
        shapes.pop(name, None)  # read by rows and in blocks
    largest = max(math.prod(shape) for shape in shapes.values())
    widest = max(config.text.intermediate_size, config.vision.intermediate_size)
    activations = ACTIVATION_COPIES * OBSERVED_TOKENS * widest
    return PROCESS_BASE_BYTES + FLOAT_BYTES * (OBSERVED_COPIES * largest + activations)


def _elements(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
