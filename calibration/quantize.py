"""Make a quantized checkpoint from a 16-bit one.

Weights pass through tensor by tensor: memory stays at a few blocks of rows, whatever the model's
size.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from framesink.calibration.cache_scales import cache_scales, modelopt_cache_scales
from framesink.calibration.encode import WEIGHT_FORMATS, LinearEncoder
from framesink.calibration.fingerprint import checkpoint_fingerprint
from framesink.calibration.formats import clamp_dead, scale_of
from framesink.calibration.layouts import (
    LAYER_CONFIG_NAME,
    MODELOPT_QUANTIZATION_NAME,
    Layout,
    config_entry,
    fit_to_layout,
    layer_config,
    modelopt_description,
)
from framesink.calibration.observers import Observer
from framesink.calibration.quantized_weights import QuantizedWeights
from framesink.calibration.recipe import LINEAR_SCHEMES, Recipe
from framesink.calibration.smoothing_plan import SmoothingPlan, plan_smoothing
from framesink.calibration.smoothquant import input_groups
from framesink.calibration.statistics import Statistics
from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import CheckpointError, OptionError, OutputError
from framesink.runtime.models.checkpoint import CONFIG_NAME, WEIGHTS_NAME, Checkpoint
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.models.quantization import (
    QUANTIZATION_NAME,
    CacheScheme,
    LinearScheme,
    Quantization,
)
from framesink.runtime.staging import check_output, staged_directory

W8A8_SCHEMES = (LinearScheme.FP8, LinearScheme.INT8)
# Of the time it takes, about what SmoothQuant's search needs.
PLANNING_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class QuantizeSummary:
    """What was written.

    `linears` counts quantized linear layers by scheme. `replaced` says what was asked for and is
    held otherwise, and how and why: each reason with the names it applies to. `dead_rows` (output
    channels of weights; INT4: groups of them), `dead_inputs` (input channels) and `dead_cache`
    (channels of K, heads of V) count what was as good as 0 and got the smallest scale. `alphas` is
    SmoothQuant's α of each INT8 layer. Bytes are those of all weights.
    """

    layout: Layout
    linears: Mapping[LinearScheme, int]
    cache: CacheScheme
    replaced: Mapping[str, tuple[str, ...]]
    dead_rows: int
    dead_inputs: int
    dead_cache: int
    alphas: Mapping[str, float]
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    recipe: Recipe,
    output: Path,
    *,
    layout: Layout = Layout.FRAMESINK,
    observer: Observer = Observer.ABSMAX,
    force: bool = False,
    on_progress: Callable[[float], None] = lambda _: None,
) -> QuantizeSummary:
    """Write `checkpoint`, quantized as `recipe` says, to the directory `output`.

    `statistics` may be None where only weights are quantized. `observer` chooses the input ranges
    of FP8 layers; those of INT8 layers are absolute maxima, since SmoothQuant changes what values
    there are. `on_progress` gets the share that is done.

    Raises OptionError for a recipe that does not fit the model or lacks statistics, CheckpointError
    for a checkpoint that is quantized already or damaged and for statistics of another one, and
    OutputError if `output` exists and `force` is not given, or cannot be written.
    """
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{checkpoint.directory} is quantized already; quantize the 16-bit checkpoint."
        )
    config = checkpoint.config
    asked = recipe.resolve(config)
    fitted = fit_to_layout(asked, layout)
    quantization = fitted.quantization
    _check_statistics(checkpoint, statistics, quantization)
    companions = companion_files(checkpoint.directory)
    check_output(
        output,
        kind="quantized checkpoint",
        marker=QUANTIZATION_NAME,
        force=force,
        failure=OutputError,
    )

    smooths = LinearScheme.INT8 in quantization.linears.values()
    planning = PLANNING_SHARE if smooths else 0.0
    smoothing, dead_cache = SmoothingPlan(), 0
    added: dict[str, Float32Array] = {}
    if statistics is not None:
        smoothing = plan_smoothing(
            checkpoint,
            statistics,
            quantization,
            alpha=recipe.smoothquant_alpha,
            fold=layout is Layout.FRAMESINK,
            on_progress=lambda share: on_progress(planning * share),
        )
        if quantization.cache is not CacheScheme.UNQUANTIZED:
            added, dead_cache = cache_scales(statistics.layers, quantization.cache)
            if layout is not Layout.FRAMESINK:
                added = modelopt_cache_scales(statistics.layers, quantization.cache)
    encoders = _encoders(checkpoint, statistics, quantization, smoothing, layout, observer)
    weights = QuantizedWeights(checkpoint, encoders, smoothing.norms, added)
    with staged_directory(output, OutputError) as directory:
        try:
            for file in companions:
                shutil.copy(file, directory / file.name)
            bytes_after = weights.write(
                directory / WEIGHTS_NAME,
                lambda share: on_progress(planning + (1.0 - planning) * share),
            )
            _describe(checkpoint, quantization, layout, directory)
        except OSError as error:
            raise OutputError(f"Cannot write {output}: {error.strerror or error}.") from error
    return QuantizeSummary(
        layout=layout,
        linears=Counter(quantization.linears.values()),
        cache=quantization.cache,
        replaced={**_without_int4(checkpoint, recipe, asked), **fitted.left},
        dead_rows=sum(encoder.dead_rows for encoder in encoders.values()),
        dead_inputs=_dead_inputs(checkpoint, statistics, quantization),
        dead_cache=dead_cache,
        alphas=smoothing.alphas,
        bytes_before=sum(checkpoint.info(name).nbytes for name in checkpoint.names()),
        bytes_after=bytes_after,
    )


def needs_statistics(quantization: Quantization) -> bool:
    """Whether something is quantized whose range only calibration knows: inputs, K or V."""
    return quantization.cache is not CacheScheme.UNQUANTIZED or any(
        scheme in W8A8_SCHEMES for scheme in quantization.linears.values()
    )


def _check_statistics(
    checkpoint: Checkpoint, statistics: Statistics | None, quantization: Quantization
) -> None:
    if statistics is not None:
        if statistics.checkpoint != checkpoint_fingerprint(checkpoint):
            raise CheckpointError(
                f"The calibration statistics are those of another checkpoint than "
                f"{checkpoint.directory}; calibrate again."
            )
        return
    if needs_statistics(quantization):
        raise OptionError(
            "FP8, INT8 and a quantized K/V cache need calibration statistics; only weight-only "
            "precisions go without."
        )


def _encoders(
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    quantization: Quantization,
    smoothing: SmoothingPlan,
    layout: Layout,
    observer: Observer,
) -> dict[str, LinearEncoder]:
    encoders = {}
    for name, scheme in quantization.linears.items():
        if scheme is LinearScheme.UNQUANTIZED:
            continue
        factors = smoothing.factors.get(name)
        encoders[name] = LinearEncoder(
            checkpoint,
            name,
            scheme,
            factors=factors,
            explicit=name in smoothing.explicit,
            rows=smoothing.rows.get(name),
            per_tensor=layout is not Layout.FRAMESINK,
        )
        if statistics is not None and scheme in W8A8_SCHEMES:
            number_format = WEIGHT_FORMATS[scheme]
            amax = statistics.input_amax(name, observer, number_format)
            if factors is not None:
                amax = float((statistics.linears[name].amax * factors).max())
            clamped, _ = clamp_dead(np.array(amax, dtype=np.float32))
            encoders[name].input_scale = float(scale_of(clamped, number_format))
    return encoders


def _describe(
    checkpoint: Checkpoint, quantization: Quantization, layout: Layout, directory: Path
) -> None:
    """Write what says how the weights in `directory` are to be read."""
    path = directory / CONFIG_NAME
    config = json.loads(path.read_text())
    if layout is Layout.FRAMESINK:
        quantization.write(directory)
        # So that other readers refuse the checkpoint instead of misreading it.
        config["quantization_config"] = {"quant_method": "framesink"}
    else:
        # framesink's own K/V scales are not in this layout.
        replace(quantization, cache=CacheScheme.UNQUANTIZED).write(directory)
        description = modelopt_description(checkpoint.config, quantization)
        if description is not None:
            _write_json(directory / MODELOPT_QUANTIZATION_NAME, description)
            config["quantization_config"] = config_entry(description)
            layers = layer_config(description)
            if layers is not None:
                _write_json(directory / LAYER_CONFIG_NAME, layers)
    _write_json(path, config)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _without_int4(
    checkpoint: Checkpoint, recipe: Recipe, asked: Quantization
) -> dict[str, tuple[str, ...]]:
    """Layers that the recipe wants in INT4 and that cannot have it."""
    names = tuple(
        name
        for name, precision in recipe.precisions(checkpoint.config).items()
        if LINEAR_SCHEMES[precision] is not asked.scheme(name)
    )
    reason = f"INT8 weight-only: the inputs are no multiple of INT4's group of {asked.int4_group}"
    return {reason: names} if names else {}


def _dead_inputs(
    checkpoint: Checkpoint, statistics: Statistics | None, quantization: Quantization
) -> int:
    """Dead input channels of the W8A8 layers; layers that share an input count once."""
    if statistics is None:
        return 0
    groups = (
        [name for name in group.linears if quantization.scheme(name) in W8A8_SCHEMES]
        for group in input_groups(checkpoint.config)
    )
    return sum(clamp_dead(statistics.linears[names[0]].amax)[1] for names in groups if names)
