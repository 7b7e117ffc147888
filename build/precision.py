"""The precisions a person asks for, the schemes they stand for, and what a checkpoint has."""

from collections import Counter
from collections.abc import Mapping

from framesink.build.options import BuildOptions
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import CachePrecision, ComputeType, PartName, Precision
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
    quantizable_linears,
)
from framesink.runtime.models.weights import LM_HEAD

_LINEAR_PRECISIONS: Mapping[LinearScheme, Precision] = {
    LinearScheme.FP8: "fp8",
    LinearScheme.INT8: "int8",
    LinearScheme.INT8_WEIGHT_ONLY: "int8-weight-only",
    LinearScheme.INT4_WEIGHT_ONLY: "int4-weight-only",
}
_HEAD = LM_HEAD.removesuffix(".weight")
_UNQUANTIZED: Mapping[ComputeType, Precision] = {"float16": "fp16", "bfloat16": "bf16"}
_UNQUANTIZED_CACHE: Mapping[ComputeType, CachePrecision] = {"float16": "fp16", "bfloat16": "bf16"}


def linear_schemes(
    config: ModelConfig, quantization: Quantization, part: PartName
) -> dict[LinearScheme, int]:
    """How many linear layers of a part are held in each scheme."""
    names = [name for name in quantizable_linears(config) if part_of(name) == part]
    return dict(Counter(quantization.scheme(name) for name in names))


def part_precision(
    config: ModelConfig, quantization: Quantization, part: PartName, compute_type: ComputeType
) -> Precision:
    """One word for a part: the scheme that most of its quantized linear layers have, and its
    compute type where none is quantized."""
    counts = linear_schemes(config, quantization, part)
    counts.pop(LinearScheme.UNQUANTIZED, None)
    if not counts:
        return _UNQUANTIZED[compute_type]
    return _LINEAR_PRECISIONS[max(counts, key=lambda scheme: counts[scheme])]


def cache_precision(quantization: Quantization, compute_type: ComputeType) -> CachePrecision:
    """The type of the K/V pages in the plans, where `compute_type` is the language model's."""
    match quantization.cache:
        case CacheScheme.UNQUANTIZED:
            return _UNQUANTIZED_CACHE[compute_type]
        case CacheScheme.INT8:
            return "int8"
        case CacheScheme.FP8:
            return "fp8"


def scheme_name(scheme: LinearScheme) -> str:
    """A scheme as a person writes it."""
    return _LINEAR_PRECISIONS.get(scheme, "16 bits")


def part_of(linear: str) -> PartName:
    """The model part that a linear layer, or a tensor of one, belongs to."""
    return "vision_encoder" if linear.startswith("visual.") else "language_model"


def computes_in_fp8(quantization: Quantization) -> bool:
    """Whether the compiled graphs need FP8 arithmetic of the GPU."""
    return (
        LinearScheme.FP8 in quantization.linears.values() or quantization.cache is CacheScheme.FP8
    )


def check_agreement(options: BuildOptions, config: ModelConfig, found: Quantization) -> None:
    """Whether the options given fit a checkpoint that is quantized already.

    Raises BuildError for the first that contradicts it.
    """
    directory = options.checkpoint
    has: dict[str, str] = {
        "--precision": part_precision(config, found, "language_model", "float16"),
        "--head-precision": _LINEAR_PRECISIONS.get(found.scheme(_HEAD), "fp16"),
        "--vision-precision": part_precision(config, found, "vision_encoder", "float16"),
        "--kv-precision": cache_precision(found, "float16"),
    }
    asked = {
        "--precision": options.precision,
        "--head-precision": options.head_precision,
        "--vision-precision": options.vision_precision,
        "--kv-precision": options.kv_precision,
    }
    for option, value in asked.items():
        if value is not None and value != has[option]:
            raise BuildError(
                f"{option} {value} contradicts {directory}, which is quantized already and holds "
                f"{has[option]} there; leave {option} out, or give the 16-bit checkpoint."
            )
    for option, given in (("--recipe", options.recipe), ("--observer", options.observer)):
        if given is not None:
            raise BuildError(
                f"{option} has no effect on {directory}, which is quantized already; leave it "
                "out, or give the 16-bit checkpoint."
            )
