"""`manifest.json` of an engine bundle: what is inside, and what it needs to run."""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import LinearScheme
from framesink.runtime.preprocess import PreprocessConfig

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

ComputeType = Literal["float16", "bfloat16", "float32"]
Precision = Literal["fp16", "bf16", "fp8", "int8", "int8-weight-only", "int4-weight-only"]
CachePrecision = Literal["fp16", "bf16", "fp32", "fp8", "int8"]
PartName = Literal["language_model", "vision_encoder"]
PART_NAMES: tuple[PartName, ...] = ("vision_encoder", "language_model")


def _stay_inside(name: str) -> str:
    path = PurePosixPath(name)
    if (
        not path.parts
        or path.is_absolute()
        or str(path) != name
        or ".." in path.parts
        or any(character in name for character in "\\\0")
    ):
        raise ValueError("a file must be named by a plain path inside the bundle")
    return name


# A POSIX path relative to the bundle's directory that cannot leave it.
BundlePath = Annotated[str, AfterValidator(_stay_inside)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Model):
    """A graph input or output; a string is a dynamic dimension's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class ProfileShape(_Model):
    """Smallest, best and largest shape of one input in one optimization profile."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


class OptimizationProfile(_Model):
    """One TensorRT optimization profile."""

    name: str
    inputs: dict[str, ProfileShape]


class GraphSpec(_Model):
    """An ONNX graph of a part, in one compute type; its weights lie in the bundle's safetensors."""

    path: BundlePath
    compute_type: ComputeType
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def page_type(self) -> str | None:
        """The type of its K/V pages; None for a graph that has none."""
        types = {value.dtype for value in self.inputs if "_pages." in value.name}
        return ", ".join(sorted(types)) or None


class PlanSpec(_Model):
    """A TensorRT plan of a part. A plan cannot be inspected without a GPU, so all that a loader
    must know is written here at build time."""

    path: BundlePath
    builder: Literal["tensorrt", "tensorrt_rtx"]
    builder_version: str
    targets: tuple[str, ...] = Field(description="SM names, such as sm89")
    compute_type: ComputeType
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[OptimizationProfile, ...]


class PartSpec(_Model):
    """One model part: the graph ONNX Runtime executes, the graph the plans were compiled from.

    `precision` is that of most of its linear layers; `linears` counts them all by scheme.
    """

    precision: Precision
    linears: dict[LinearScheme, PositiveInt] = Field(default_factory=dict)
    executed: GraphSpec
    compiled: GraphSpec
    plans: tuple[PlanSpec, ...]


class Limits(_Model):
    """What the profiles were built for. Lengths are in tokens, `max_patches` in ViT patches."""

    max_streams: PositiveInt
    max_context: PositiveInt
    max_prefill: PositiveInt
    max_patches: PositiveInt


class StreamingDefaults(_Model):
    """How a session runs unless told otherwise; times in seconds of video, the rest in tokens."""

    system_prompt: str = "You are a helpful assistant."
    chunk_seconds: float = 1.0
    sink_text: int = 512
    recent_text: int = 512
    vision_seconds: float = 16.0
    reply_turns: int = 16
    max_new_tokens: int = 20
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    query: str | None = None


class FileRecord(_Model):
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


class Manifest(_Model):
    """The whole of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    framesink_version: str
    created: str
    model_name: str
    model: ModelConfig
    preprocess: PreprocessConfig
    page_size: PositiveInt
    cache_precision: CachePrecision
    limits: Limits
    streaming: StreamingDefaults
    language_model: PartSpec
    vision_encoder: PartSpec
    embedding_tensor: str = Field(description="name of the token embedding in the weights file")
    weights: tuple[BundlePath, ...]
    versions: dict[str, str]
    activation_ranges: BundlePath | None = None
    verification: BundlePath | None = None
    accuracy: BundlePath | None = None
    checkpoint: BundlePath | None = Field(
        default=None, description="directory of a checkpoint that TensorRT-LLM reads"
    )
    files: dict[BundlePath, FileRecord]

    def part(self, name: PartName) -> PartSpec:
        """A model part by its name."""
        return self.language_model if name == "language_model" else self.vision_encoder

    @property
    def is_quantized(self) -> bool:
        """Whether weights or K/V pages are of less than 16 bits."""
        whole = ("fp16", "bf16")
        precisions = (self.language_model.precision, self.vision_encoder.precision)
        return any(name not in whole for name in (*precisions, self.cache_precision))

    def named_files(self) -> set[str]:
        """Every file that some field of the manifest points to."""
        optional = (self.activation_ranges, self.verification, self.accuracy)
        names = {*self.weights, *(name for name in optional if name is not None)}
        if self.checkpoint is not None:
            names.add(f"{self.checkpoint}/config.json")
        for part in (self.language_model, self.vision_encoder):
            names |= {part.executed.path, part.compiled.path, *(plan.path for plan in part.plans)}
        return names
