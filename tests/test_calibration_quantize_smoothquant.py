"""SmoothQuant's factors, the search for α, and folding."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference.dense_model import load_model
from reference.observed_model import observe_model, video_prompt

from framesink.calibration.recipe import Recipe
from framesink.calibration.smoothing_plan import SmoothingPlan, plan_smoothing
from framesink.calibration.smoothquant import (
    ALPHAS,
    centered,
    fold_into_norm,
    input_groups,
    output_error,
    search_alpha,
    smoothing_factors,
)
from framesink.calibration.statistics import Statistics
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import quantizable_linears
from framesink.runtime.models.weights import canonical_name

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

amax = st.floats(2.0**-10, 2.0**10, width=32)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint) -> Statistics:
    import torch

    model = load_model(checkpoint.directory, torch.float32)
    return observe_model(model, checkpoint, video_prompt(model))


def plan_of(
    checkpoint: Checkpoint, statistics: Statistics, recipe: Recipe, *, fold: bool = True
) -> SmoothingPlan:
    return plan_smoothing(
        checkpoint,
        statistics,
        recipe.resolve(checkpoint.config),
        alpha=recipe.smoothquant_alpha,
        fold=fold,
    )


ALL_INT8 = Recipe(
    language_model="int8",
    vision_encoder="int8",
    overrides={"visual.merger.*": "int8", "lm_head": "fp16"},
)


@given(inputs=amax, weight=amax, alpha=st.sampled_from(ALPHAS))
def test_factors_are_those_of_the_paper(inputs: float, weight: float, alpha: float) -> None:
    (factor,) = smoothing_factors(np.float32([inputs]), np.float32([weight]), alpha)
    smoothing = inputs**alpha / weight ** (1 - alpha)
    assert factor == pytest.approx(1 / smoothing, rel=1e-5)


def test_dead_channels_keep_their_inputs() -> None:
    inputs = np.array([0.0, 1e-12, 4.0, 4.0], dtype=np.float32)
    weights = np.array([1.0, 1.0, 0.0, 1.0], dtype=np.float32)
    assert smoothing_factors(inputs, weights, 0.5).tolist() == [1.0, 1.0, 1.0, 0.5]


@given(arrays(np.float32, 5, elements=st.floats(2.0**-12, 2.0**12, width=32)))
def test_centering_keeps_ratios(factors: np.ndarray) -> None:
    found = centered(factors).astype(np.float64)
    assert np.exp(np.log(found).mean()) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(found / found[0], factors / np.float64(factors[0]), rtol=1e-5)


def _expected_error(
    weight: np.ndarray, amax_x: np.ndarray, square: np.ndarray, factors: np.ndarray, chunks: int
) -> float:
    """The formula of `search_alpha`, in plain loops of float64."""
    rows, inputs = weight.shape
    largest = max(amax_x[j] * factors[j] for j in range(inputs))
    step = largest / 127
    total = 0.0
    for o in range(rows):
        smoothed = [weight[o, j] / factors[j] for j in range(inputs)]
        scale = max(abs(value) for value in smoothed) / 127
        for j in range(inputs):
            own = square[j] * factors[j] ** 2
            error = round(smoothed[j] / scale) * scale - smoothed[j]
            total += error**2 * own + smoothed[j] ** 2 * min(step**2 / 12, own)
            tail = amax_x[j] / math.log(chunks)
            beyond = math.exp(-(largest / factors[j] - amax_x[j]) / tail)
            total += weight[o, j] ** 2 * 2 * tail**2 / chunks * beyond
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_search_minimises_what_it_says(seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(6, 9)).astype(np.float32)
    amax_x = np.exp(random.normal(size=9) * 1.5).astype(np.float32)
    square = (amax_x / random.uniform(2, 6, 9)).astype(np.float32) ** 2
    weight_amax = np.abs(weight).max(axis=0)
    errors = {}
    for alpha in ALPHAS:
        factors = smoothing_factors(amax_x, weight_amax, alpha)
        exact = (array.astype(np.float64) for array in (weight, amax_x, square, factors))
        errors[alpha] = _expected_error(*exact, 40)
        found = output_error([weight], amax_x, square, 40, factors)
        assert found == pytest.approx(errors[alpha], rel=1e-2)
    alpha = search_alpha([weight], weight_amax, amax_x, square, 40)
    assert errors[alpha] <= 1.01 * min(errors.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_search_suits_inputs_that_were_not_calibrated_on(seed: int) -> None:
    """Layers quantized by few inputs with outlier channels, and run on many others."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.normal(size=64))
    spread[:3] *= 30.0
    inputs = (random.laplace(size=(4096, 64)) * spread).astype(np.float32)
    seen, unseen = inputs[:64], inputs[64:]
    weight = random.normal(size=(48, 64)).astype(np.float32)
    amax_x, weight_amax = np.abs(seen).max(axis=0), np.abs(weight).max(axis=0)

    def rounded(values: np.ndarray, largest: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(values * (127 / largest)), -128, 127) * (largest / 127)

    def real_error(factors: np.ndarray) -> float:
        x, w = unseen * factors, weight / factors
        quantized = rounded(x, (amax_x * factors).max())
        outputs = quantized @ rounded(w, np.abs(w).max(axis=1)[:, None]).T
        return float(np.square(outputs - unseen @ weight.T).mean())

    square = np.square(seen).mean(axis=0)
    alpha = search_alpha([weight], weight_amax, amax_x, square, len(seen))
    errors = {a: real_error(smoothing_factors(amax_x, weight_amax, a)) for a in ALPHAS}
    assert errors[alpha] < 2.0 * min(errors.values())
    assert errors[alpha] < real_error(np.ones(64, dtype=np.float32))
    assert errors[alpha] < 0.9 * errors[1.0]  # ModelOpt's default


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@given(
    weights=arrays(np.float32, 8, elements=st.floats(-3, 3, width=16)),
    factors=arrays(np.float32, 8, elements=st.floats(2.0**-13, 2.0**13, width=32)),
)
def test_a_folded_norm_and_its_factors_fit_exactly(
    dtype: type, weights: np.ndarray, factors: np.ndarray
) -> None:
    norm = weights.astype(dtype)
    folded, taken = fold_into_norm(norm, factors)
    assert folded.dtype == norm.dtype
    assert np.all(taken > 0)
    np.testing.assert_allclose(
        folded.astype(np.float64), norm.astype(np.float64) * taken, rtol=2.0**-23
    )
    normal = np.abs(norm.astype(np.float64) * factors) > 2.0**-13
    np.testing.assert_allclose(taken[normal], factors[normal], rtol=2.0**-7)


def test_every_linear_layer_is_in_one_group(checkpoint: Checkpoint) -> None:
    names = [name for group in input_groups(checkpoint.config) for name in group.linears]
    assert sorted(names) == sorted(quantizable_linears(checkpoint.config))


def test_folding_leaves_the_models_function_as_it_was(
    checkpoint: Checkpoint,
    statistics: Statistics,
    tiny_model: "Qwen2_5_VLForConditionalGeneration",
) -> None:
    """In float64, in transformers, before anything is rounded to INT8."""
    import torch

    plan = plan_of(checkpoint, statistics, ALL_INT8)
    text, vision = checkpoint.config.text, checkpoint.config.vision
    # Per decoder layer q, k, v, gate, up and down; per vision block qkv, gate and up.
    assert len(plan.folded) == 6 * text.num_hidden_layers + 3 * vision.depth
    assert len(plan.explicit) == text.num_hidden_layers + 2 * vision.depth + 2

    inputs = video_prompt(tiny_model)
    with torch.no_grad():
        expected = tiny_model(**inputs).logits
    smoothed = load_model(checkpoint.directory)
    _apply(plan, smoothed)
    with torch.no_grad():
        found = smoothed(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _apply(plan: SmoothingPlan, model: "Qwen2_5_VLForConditionalGeneration") -> None:
    import torch

    def scaling(factors: torch.Tensor) -> Callable[..., tuple[torch.Tensor]]:
        return lambda _, arguments: (arguments[0] * factors,)

    norms, modules = dict(plan.norms), 0
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if canonical_name(path) in norms:
                folded = norms.pop(canonical_name(path))
                parameter.copy_(torch.from_numpy(folded.astype(np.float64)))
        for path, module in model.named_modules():
            name = canonical_name(path)
            if name in plan.factors:
                factors = torch.from_numpy(plan.factors[name].astype(np.float64))
                module.weight /= factors
                modules += 1
                if name in plan.explicit:
                    module.register_forward_pre_hook(scaling(factors))
            if name in plan.rows:
                rows = torch.from_numpy(plan.rows[name].astype(np.float64))
                module.weight *= rows[:, None]
    assert not norms
    assert modules == len(plan.factors)


def test_a_norm_is_folded_into_only_if_all_its_readers_are_int8(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    recipe = Recipe(
        language_model="int8",
        overrides={
            "model.layers.0.self_attn.k_proj": "fp16",
            "model.layers.1.mlp.gate_proj": "fp8",
            "model.layers.2.mlp.up_proj": "fp16",
        },
    )
    plan = plan_of(checkpoint, statistics, recipe)
    assert "model.layers.0.input_layernorm.weight" not in plan.norms
    assert "model.layers.1.post_attention_layernorm.weight" not in plan.norms
    explicit = {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.gate_proj",
        "model.layers.2.mlp.down_proj",  # up_proj has no scales that could take its factors
    }
    others = {f"model.layers.{index}.self_attn.o_proj" for index in range(3)}
    assert plan.explicit.keys() == explicit | others
    shared = [plan.factors[f"model.layers.0.self_attn.{name}_proj"] for name in "qv"]
    np.testing.assert_array_equal(shared[0], shared[1])


def test_without_folding_every_factor_is_explicit(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    plan = plan_of(checkpoint, statistics, ALL_INT8, fold=False)
    assert plan.explicit.keys() == plan.factors.keys()
    assert not plan.norms
    assert not plan.rows


def test_a_given_alpha_is_used_everywhere(checkpoint: Checkpoint, statistics: Statistics) -> None:
    recipe = ALL_INT8.model_copy(update={"smoothquant_alpha": 0.35})
    plan = plan_of(checkpoint, statistics, recipe)
    assert set(plan.alphas.values()) == {0.35}
    assert plan.alphas.keys() == plan.factors.keys()
