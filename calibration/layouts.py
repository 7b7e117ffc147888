"""The forms a quantized checkpoint is written in, what each can hold, and ModelOpt's description.

"framesink" holds all there is. "modelopt" is the unified Hugging Face layout of nvidia-modelopt
(`modelopt/torch/export/unified_export_hf.py`, version 0.47), which vLLM and SGLang read;
"tensorrt-llm" is the part of it that TensorRT-LLM takes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
    quantizable_linears,
)
from framesink.runtime.models.weights import EMBEDDING, LM_HEAD

MODELOPT_QUANTIZATION_NAME = "hf_quant_config.json"
LAYER_CONFIG_NAME = "quant_cfg.json"
# Readers recognise the layout by its producer.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_ALGORITHMS: Mapping[LinearScheme, str] = {
    LinearScheme.FP8: "FP8",
    LinearScheme.INT8: "W8A8_SQ_PER_CHANNEL",
    LinearScheme.INT8_WEIGHT_ONLY: "W8A16",
}
_CACHE_ALGORITHMS: Mapping[CacheScheme, str] = {CacheScheme.FP8: "FP8", CacheScheme.INT8: "INT8"}
_MIXED = "MIXED_PRECISION"
_TABLES = (EMBEDDING, LM_HEAD)
_FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_INT8 = {"dynamic": False, "num_bits": 8, "type": "int"}
# The entries of `config_groups` that ModelOpt writes for each algorithm.
_GROUPS: Mapping[str, Mapping[str, Any]] = {
    "FP8": {"input_activations": _FLOAT8, "weights": _FLOAT8},
    "W8A8_SQ_PER_CHANNEL": {
        "input_activations": _INT8,
        "weights": {**_INT8, "strategy": "channel"},
    },
    "W8A16": {"weights": _INT8},
}


class Layout(StrEnum):
    """See the module."""

    FRAMESINK = "framesink"
    MODELOPT = "modelopt"
    TENSORRT_LLM = "tensorrt-llm"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What of a quantization a layout can hold. `left` says why the rest stays in 16-bit: each
    reason with the names it applies to (linear layers, or "K/V cache")."""

    quantization: Quantization
    left: Mapping[str, tuple[str, ...]]


def fit_to_layout(quantization: Quantization, layout: Layout) -> Fitted:
    """Leave in 16-bit what the readers of a layout cannot take."""
    left: dict[str, list[str]] = {}
    linears: dict[str, LinearScheme] = {}
    for name, scheme in quantization.linears.items():
        reason = _obstacle(name, scheme, layout)
        if reason is None:
            linears[name] = scheme
        else:
            left.setdefault(reason, []).append(name)
    cache = quantization.cache
    if layout is Layout.TENSORRT_LLM and cache is CacheScheme.INT8:
        cache = CacheScheme.UNQUANTIZED
        left["16-bit: TensorRT-LLM's PyTorch backend has no INT8 K/V cache"] = ["K/V cache"]
    return Fitted(
        Quantization(linears, cache, quantization.int4_group),
        {reason: tuple(names) for reason, names in left.items()},
    )


def _obstacle(name: str, scheme: LinearScheme, layout: Layout) -> str | None:
    """Why a layer cannot have its scheme in a layout, or None."""
    if layout is Layout.FRAMESINK or scheme is LinearScheme.UNQUANTIZED:
        return None
    if layout is Layout.TENSORRT_LLM and name.startswith("visual."):
        return "16-bit: TensorRT-LLM does not load a quantized vision encoder"
    if layout is Layout.TENSORRT_LLM and scheme is LinearScheme.INT8:
        return "16-bit: TensorRT-LLM does not read SmoothQuant"
    if scheme is LinearScheme.INT4_WEIGHT_ONLY:
        return "16-bit: ModelOpt's layout has INT4 only as AWQ"
    return None


def modelopt_description(config: ModelConfig, quantization: Quantization) -> dict[str, Any] | None:
    """The content of `hf_quant_config.json`; None where nothing is quantized."""
    layers = {
        name: {"quant_algo": _ALGORITHMS[scheme]}
        for name, scheme in quantization.linears.items()
        if scheme is not LinearScheme.UNQUANTIZED
    }
    algorithms = sorted({layer["quant_algo"] for layer in layers.values()})
    if not algorithms and quantization.cache is CacheScheme.UNQUANTIZED:
        return None
    details: dict[str, Any] = {
        "quant_algo": None,
        "kv_cache_quant_algo": _CACHE_ALGORITHMS.get(quantization.cache),
    }
    if len(algorithms) > 1:
        details |= {"quant_algo": _MIXED, "quantized_layers": layers}
    elif algorithms:
        details["quant_algo"] = algorithms[0]
        details["exclude_modules"] = _exclude_modules(config, layers)
    return {"producer": PRODUCER, "quantization": details}


def config_entry(description: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` that ModelOpt adds to `config.json`, which says the same.

    Source: `modelopt/torch/export/convert_hf_config.py`.
    """
    details = description["quantization"]
    algorithm = details["quant_algo"]
    entry: dict[str, Any] = {}
    if algorithm == "FP8":
        entry["config_groups"] = {"group_0": {**_GROUPS["FP8"], "targets": ["Linear"]}}
    elif algorithm == _MIXED:
        layers: Mapping[str, Mapping[str, str]] = details["quantized_layers"]
        targets: dict[str, list[str]] = {}
        for name, layer in layers.items():
            targets.setdefault(layer["quant_algo"], []).append(name)
        entry["config_groups"] = {
            f"group_{number}": {**_GROUPS[group], "targets": sorted(names)}
            for number, (group, names) in enumerate(targets.items())
        }
        entry["quantized_layers"] = layers
    entry["ignore"] = details.get("exclude_modules", [])
    if algorithm is not None:
        entry["quant_algo"] = algorithm
    cache = details["kv_cache_quant_algo"]
    if cache is not None:
        entry["kv_cache_scheme"] = _FLOAT8 if cache == "FP8" else cache
    return {**entry, "producer": description["producer"], "quant_method": "modelopt"}


def layer_config(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of `quant_cfg.json`, which TensorRT-LLM wants beside a mixed description; None
    where it is not mixed."""
    details = description["quantization"]
    return dict(details) if details["quant_algo"] == _MIXED else None


def _exclude_modules(config: ModelConfig, quantized: Iterable[str]) -> list[str]:
    """The linear layers and the embedding that are not quantized, as few prefixes as will do."""
    names = {*quantizable_linears(config), *(key.removesuffix(".weight") for key in _TABLES)}
    taken = set(quantized)
    return sorted({_shortest_pattern(name, taken) for name in names - taken})


def _shortest_pattern(name: str, quantized: set[str]) -> str:
    """The shortest `prefix*` or `prefix.*` that matches `name` but nothing quantized, else `name`.

    A prefix ends where a dot follows, as in ModelOpt.
    """
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length])
        for stem in (prefix, f"{prefix}."):
            if not any(other.startswith(stem) for other in quantized):
                return f"{stem}*"
    return name
