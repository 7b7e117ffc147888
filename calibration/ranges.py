"""`activation_ranges.json`: the largest magnitudes seen in each layer, and what they imply."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from framesink.runtime.errors import CheckpointError
from framesink.runtime.manifest import PartName

RANGES_NAME = "activation_ranges.json"
FLOAT16_MAX = 65504.0
# Calibration sees a few chunks of video; hours of it may hold somewhat larger values.
FLOAT16_SAFE_FRACTION = 0.5


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerRange(_Model):
    """Absolute maxima of one layer's tensors, by the tensor's name."""

    layer: str
    maxima: dict[str, float]


class PartRanges(_Model):
    """All layers of one model part, in the order they run."""

    layers: tuple[LayerRange, ...]

    @property
    def largest(self) -> tuple[float, str]:
        """The largest magnitude of the part and where it was seen."""
        return max(
            (value, f"{layer.layer}.{tensor}")
            for layer in self.layers
            for tensor, value in layer.maxima.items()
        )

    @property
    def compute_type(self) -> Literal["float16", "bfloat16"]:
        """float16 where everything seen stays within half of its range, else bfloat16."""
        limit = FLOAT16_SAFE_FRACTION * FLOAT16_MAX
        return "float16" if self.largest[0] <= limit else "bfloat16"


class ActivationRanges(_Model):
    """What was observed, on how much input."""

    checkpoint: str = Field(description="fingerprint of the checkpoint that was observed")
    source: str
    chunks: int
    tokens: int
    patches: int
    vision_encoder: PartRanges
    language_model: PartRanges

    def part(self, name: PartName) -> PartRanges:
        """A part's ranges by its name."""
        return self.language_model if name == "language_model" else self.vision_encoder

    def write(self, directory: Path) -> Path:
        """Write `activation_ranges.json` into `directory`; returns its path."""
        path = directory / RANGES_NAME
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "ActivationRanges":
        """Read a file that `write` wrote. Raises CheckpointError if it is malformed."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{path} holds no activation ranges; write it again with framesink calibrate."
            ) from error
