"""SmoothQuant: move outliers of a linear layer's inputs into its weights before INT8 rounds both.

Source: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
Xiao et al., arXiv 2211.10438. Input channel j is divided by

    s_j = max|x_j|^α / max|w_j|^(1-α)

and the weight's column j is multiplied by it. What is stored, and multiplies the inputs, is
`pre_quant_scale` = 1 / s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from framesink.calibration.formats import (
    INT8,
    clamp_dead,
    dequantize,
    quantize,
    row_amax,
    scale_of,
)
from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.weights import FINAL_NORM, LM_HEAD, MERGER, block_name, layer_name

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))
# The limits ModelOpt sets: beyond them a channel is as good as dead, or all there is.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-4, 1e4
# Rows of each weight that the search for α looks at.
SEARCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linear layers that read one and the same input, by name.

    `norm` is the weight of the RMSNorm whose output that input is, unchanged; `product` the linear
    layer without bias to whose outputs it is proportional, channel by channel. Into either a factor
    per input channel can be folded.
    """

    linears: tuple[str, ...]
    norm: str | None = None
    product: str | None = None


def input_groups(config: ModelConfig) -> Iterator[InputGroup]:
    """All linear layers of a model, grouped by what they read.

    The inputs of o_proj are proportional to v_proj's outputs too, but a factor there would change
    what the V cache holds, and all query heads of a group would have to share it: it stays where it
    is. The vision encoder's up_proj has a bias, which lies in the checkpoint's 16-bit type and so
    cannot take a factor exactly.
    """
    for index in range(config.text.num_hidden_layers):
        layer = layer_name(index)
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        yield InputGroup(
            tuple(f"{attention}.{name}_proj" for name in "qkv"),
            norm=f"{layer}.input_layernorm.weight",
        )
        yield InputGroup((f"{attention}.o_proj",))
        yield InputGroup(
            (f"{mlp}.gate_proj", f"{mlp}.up_proj"), norm=f"{layer}.post_attention_layernorm.weight"
        )
        yield InputGroup((f"{mlp}.down_proj",), product=f"{mlp}.up_proj")
    if not config.text.tie_word_embeddings:
        yield InputGroup((LM_HEAD.removesuffix(".weight"),), norm=FINAL_NORM)
    for index in range(config.vision.depth):
        block = block_name(index)
        yield InputGroup((f"{block}.attn.qkv",), norm=f"{block}.norm1.weight")
        yield InputGroup((f"{block}.attn.proj",))
        yield InputGroup(
            (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"), norm=f"{block}.norm2.weight"
        )
        yield InputGroup((f"{block}.mlp.down_proj",))
    # The merger's norm spans one patch, its first layer reads several at once.
    yield InputGroup((f"{MERGER}.mlp.0",))
    yield InputGroup((f"{MERGER}.mlp.2",))


def smoothing_factors(
    input_amax: Float32Array, weight_amax: Float32Array, alpha: float
) -> Float32Array:
    """`pre_quant_scale` float32 `[in]` of layers that share an input.

    `input_amax` and `weight_amax` `[in]` are the largest magnitudes of each input channel and of
    the column of all the layers' weights that it meets. Channels dead on either side are left as
    they are (factor 1).
    """
    live = (clamp_dead(input_amax)[0] == input_amax) & (weight_amax > 0.0)
    inputs = np.where(live, input_amax, 1.0).astype(np.float64)
    weights = np.where(live, weight_amax, 1.0).astype(np.float64)
    factors = weights ** (1.0 - alpha) / inputs**alpha
    return np.clip(factors, SMALLEST_FACTOR, LARGEST_FACTOR).astype(np.float32)


def centered(factors: Float32Array) -> Float32Array:
    """Factors multiplied so that their geometric mean is 1.

    A common multiple changes nothing but the input's scale; this one keeps activations and folded
    weights in the range they had, which matters in float16.
    """
    logarithms = np.log(factors.astype(np.float64))
    multiplied: Float32Array = np.exp(logarithms - logarithms.mean()).astype(np.float32)
    return multiplied


def search_alpha(
    weights: Sequence[AnyArray],
    weight_amax: Float32Array,
    input_amax: Float32Array,
    mean_square: Float32Array,
    chunks: int,
) -> float:
    """The α of `ALPHAS` with the least expected error of a group's outputs; the smallest of equals.

    What is minimised is the expected squared error, summed over the outputs of all `weights`
    `[out, in]` (over at most `SEARCH_ROWS` rows of each, evenly spaced), of three causes:

        Σ_o Σ_j  e_oj² · E[x_j²] / s_j²                             weights rounded
               + (s_j·w_oj)² · min(Δ²/12, E[x_j²] / s_j²)           inputs rounded
               + w_oj² · 2σ_j²/n · exp(−(s_j·r − a_j) / σ_j)        inputs saturated

    e is the error of the smoothed weight when it is rounded to INT8 per output channel, which is
    calculated. r is the largest smoothed input and Δ = r/127 the step: rounding errors are taken to
    be uniform and independent, hence Δ²/12, but no larger than the channel itself. The third line
    is about video that calibration has not seen: a channel is taken to have an exponential tail of
    which calibration saw n = `chunks` independent samples, the largest being a_j, so that
    σ_j = a_j / ln n. Without it α = 1 looks good, which leaves no channel any headroom.

    `weight_amax` and `input_amax` (a_j) are as in `smoothing_factors`; `mean_square` float32 `[in]`
    is E[x_j²].
    """
    samples = [_sample_rows(weight) for weight in weights]
    errors = {}
    for alpha in ALPHAS:
        factors = smoothing_factors(input_amax, weight_amax, alpha)
        errors[alpha] = output_error(samples, input_amax, mean_square, chunks, factors)
    return min(errors, key=lambda alpha: errors[alpha])


def output_error(
    weights: Sequence[Float32Array],
    input_amax: Float32Array,
    mean_square: Float32Array,
    chunks: int,
    factors: Float32Array,
) -> float:
    """The expected squared error that `search_alpha` minimises, for given `pre_quant_scale`."""
    smoothed_square = mean_square * np.square(factors)
    smoothed_amax = clamp_dead(input_amax * factors)[0]
    largest = smoothed_amax.max()
    step = scale_of(largest.reshape(1), INT8)[0]
    tail = smoothed_amax / np.float32(np.log(max(chunks, 2)))
    saturation = 2.0 / chunks * np.square(tail) * np.exp((smoothed_amax - largest) / tail)
    input_error = np.minimum(np.square(step) / 12.0, smoothed_square) + saturation
    total = 0.0
    for weight in weights:
        smoothed = weight / factors
        scale = scale_of(clamp_dead(row_amax(smoothed))[0], INT8)[:, None]
        rounded = dequantize(quantize(smoothed, scale, INT8), scale)
        total += float((np.square(rounded - smoothed) @ smoothed_square).sum(dtype=np.float64))
        total += float((np.square(smoothed) @ input_error).sum(dtype=np.float64))
    return total


def fold_into_norm(norm: AnyArray, factors: Float32Array) -> tuple[AnyArray, Float32Array]:
    """Multiply a norm's weight `[in]` by `factors`; returns it, in its own type, and the factors it
    really took.

    The type rounds the product. The factors returned are those that it was rounded to, so that
    weights divided by them leave the model's function as it was. Where the weight is 0 or the
    product leaves the type's range, the channel keeps its weight.
    """
    before = norm.astype(np.float64)
    with np.errstate(over="ignore"):
        folded = (before * factors).astype(norm.dtype)
    after = folded.astype(np.float64)
    kept = (after == 0.0) | ~np.isfinite(after)
    taken = np.divide(after, before, out=np.ones_like(before), where=~kept)
    return np.where(kept, norm, folded).astype(norm.dtype), taken.astype(np.float32)


def _sample_rows(weight: AnyArray) -> Float32Array:
    step = -(-len(weight) // SEARCH_ROWS)
    return np.asarray(weight[::step]).astype(np.float32)
