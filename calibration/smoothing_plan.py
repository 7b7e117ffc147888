"""Which factors SmoothQuant gives each INT8 layer of a checkpoint, and where they go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from framesink.calibration.smoothquant import (
    InputGroup,
    centered,
    fold_into_norm,
    input_groups,
    search_alpha,
    smoothing_factors,
)
from framesink.calibration.statistics import Statistics
from framesink.calibration.weight_blocks import column_amax
from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import LinearScheme, Quantization


@dataclass(frozen=True, slots=True, eq=False)
class SmoothingPlan:
    """`factors` float32 `[in]` multiply the inputs of each INT8 layer, and divide its weight.

    Of those in `folded` something before the layer has taken them in: `norms` are the weights of
    norms that did, in the checkpoint's type; `rows` float32 `[out]` multiply the outputs of a
    linear layer that did, through its weight's scales. `alphas` says which α each layer got.
    """

    factors: dict[str, Float32Array] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)
    norms: dict[str, AnyArray] = field(default_factory=dict)
    rows: dict[str, Float32Array] = field(default_factory=dict)

    @property
    def explicit(self) -> Mapping[str, Float32Array]:
        """The factors that the graph itself must multiply inputs by."""
        return {name: value for name, value in self.factors.items() if name not in self.folded}


def plan_smoothing(
    checkpoint: Checkpoint,
    statistics: Statistics,
    quantization: Quantization,
    *,
    alpha: float | Literal["search"],
    fold: bool,
    on_progress: Callable[[float], None] = lambda _: None,
) -> SmoothingPlan:
    """Choose the factors of every INT8 layer.

    INT8 layers that read the same input share factors. With `fold` they go, where that leaves the
    model's function exactly as it was, into what makes the input: into a norm whose every reader is
    INT8, or into the weight scales of a quantized linear layer. Without it they are ModelOpt's: all
    explicit, and not centered around 1. `on_progress` gets the share that is done.

    Raises CheckpointError for a layer that calibration did not see, and for a weight that is NaN or
    infinite.
    """
    plan = SmoothingPlan()
    groups = list(input_groups(checkpoint.config))
    for number, group in enumerate(groups):
        on_progress(number / len(groups))
        smoothed = [
            name for name in group.linears if quantization.scheme(name) is LinearScheme.INT8
        ]
        if not smoothed:
            continue
        chosen, factors = _choose(checkpoint, statistics, smoothed, alpha)
        if fold:
            factors = _fold(plan, checkpoint, quantization, group, smoothed, centered(factors))
        plan.factors.update(dict.fromkeys(smoothed, factors))
        plan.alphas.update(dict.fromkeys(smoothed, chosen))
    return plan


def _choose(
    checkpoint: Checkpoint,
    statistics: Statistics,
    linears: list[str],
    alpha: float | Literal["search"],
) -> tuple[float, Float32Array]:
    if linears[0] not in statistics.linears:
        raise CheckpointError(f"Calibration saw no input of {linears[0]}; calibrate again.")
    inputs = statistics.linears[linears[0]]
    names = [f"{linear}.weight" for linear in linears]
    weight_amax = column_amax(checkpoint, names)
    if alpha == "search":
        weights = [checkpoint.read(name) for name in names]
        alpha = search_alpha(
            weights, weight_amax, inputs.amax, inputs.mean_square, statistics.chunks
        )
    return alpha, smoothing_factors(inputs.amax, weight_amax, alpha)


def _fold(
    plan: SmoothingPlan,
    checkpoint: Checkpoint,
    quantization: Quantization,
    group: InputGroup,
    smoothed: list[str],
    factors: Float32Array,
) -> Float32Array:
    """Note in `plan` where the factors of a group go; returns those that were really taken."""
    if group.norm is not None and len(smoothed) == len(group.linears):
        norm = np.asarray(checkpoint.read(group.norm))
        plan.norms[group.norm], factors = fold_into_norm(norm, factors)
        plan.folded.update(smoothed)
    elif (
        group.product is not None
        and quantization.scheme(group.product) is not LinearScheme.UNQUANTIZED
    ):
        plan.rows[group.product] = factors
        plan.folded.update(smoothed)
    return factors
