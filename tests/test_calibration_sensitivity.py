"""Which layers suffer most from quantization: found by streaming, kept within a budget."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="sensitivity is measured in torch")

from framesink.calibration.agreement import Agreement
from framesink.calibration.fake_quantization import FakeLinear
from framesink.calibration.recipe import Recipe
from framesink.calibration.recorded_turns import StreamSettings
from framesink.calibration.sensitivity import (
    GroupSensitivity,
    SensitivityReport,
    keep_in_recipe,
    measure_sensitivity,
)
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import OptionError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import LinearScheme
from framesink.runtime.video.chunk import Chunk

CHUNKS = 3
SPOILED = "model.layers.1.mlp.down_proj"


def _chunks() -> Iterator[Chunk]:
    random = np.random.default_rng(0)
    for second in range(CHUNKS):
        frames = random.integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
        yield Chunk(frames, second, second + 1.0, (second, second + 0.5), captured_at=0.0)


def _agreement(kl: float) -> Agreement:
    return Agreement(tokens=10, kl=kl, worst_kl=kl, top1=1.0)


def _report(*groups: tuple[str, float, int], together: float | None = None) -> SensitivityReport:
    members = tuple(GroupSensitivity((name,), _agreement(kl), extra) for name, kl, extra in groups)
    total = sum(kl for _, kl, _ in groups) if together is None else together
    return SensitivityReport(members, _agreement(total), CHUNKS)


@pytest.fixture(scope="module")
def measured(
    tiny_checkpoint: Path, tiny_bundle_with_pages: Callable[..., Path]
) -> SensitivityReport:
    """Every other layer in INT8, which hardly hurts, and one whose inputs nearly all saturate."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    settings = StreamSettings.from_bundle(Bundle.open(tiny_bundle_with_pages(16)))
    harmless = FakeLinear(LinearScheme.INT8_WEIGHT_ONLY)
    linears = {
        "model.layers.0.self_attn.q_proj": harmless,
        "model.layers.0.self_attn.v_proj": harmless,
        SPOILED: FakeLinear(LinearScheme.INT8, input_scale=1e-6),
        "visual.blocks.0.mlp.gate_proj": harmless,
        "visual.blocks.0.mlp.up_proj": harmless,
    }
    return measure_sensitivity(checkpoint, linears, settings, [_chunks()])


def test_the_spoiled_layer_comes_first(measured: SensitivityReport) -> None:
    assert measured.groups[0].linears == (SPOILED,)
    assert measured.groups[0].kl > 10 * measured.groups[1].kl > 0
    assert [group.kl for group in measured.groups] == sorted(
        (group.kl for group in measured.groups), reverse=True
    )
    assert measured.chunks == CHUNKS


def test_layers_that_share_their_input_are_one_group(measured: SensitivityReport) -> None:
    assert {group.linears for group in measured.groups} == {
        (SPOILED,),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"),
        ("visual.blocks.0.mlp.gate_proj", "visual.blocks.0.mlp.up_proj"),
    }


def test_a_group_costs_what_its_weights_would_take_more(
    measured: SensitivityReport, tiny_checkpoint: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    for group in measured.groups:
        shapes = [checkpoint.info(f"{name}.weight").shape for name in group.linears]
        assert group.extra_bytes == sum(rows * columns for rows, columns in shapes)


def test_keeping_the_worst_brings_the_rest_within_the_budget(
    measured: SensitivityReport,
) -> None:
    kept = measured.keep_for_kl(measured.together.kl / 2)
    assert [group.linears for group in kept] == [(SPOILED,)]


def test_a_kl_budget_takes_what_avoids_most_damage_per_byte() -> None:
    report = _report(("large", 0.3, 1000), ("small", 0.2, 10), ("tiny", 0.1, 100))
    assert [group.linears[0] for group in report.keep_for_kl(0.45)] == ["small"]
    assert [group.linears[0] for group in report.keep_for_kl(0.3)] == ["small", "tiny"]
    assert len(report.keep_for_kl(1e-9)) == 3
    assert report.keep_for_kl(0.6) == ()


def test_a_kl_budget_is_held_against_what_all_do_together() -> None:
    """Alone they add up to 0.2; together they do five times that."""
    report = _report(("first", 0.1, 10), ("second", 0.1, 10), together=1.0)
    assert len(report.keep_for_kl(0.6)) == 1
    assert len(report.keep_for_kl(0.4)) == 2


def test_a_byte_budget_is_never_exceeded() -> None:
    report = _report(("large", 0.3, 1000), ("small", 0.2, 10), ("tiny", 0.1, 100))
    assert [group.linears[0] for group in report.keep_for_bytes(110)] == ["small", "tiny"]
    assert [group.linears[0] for group in report.keep_for_bytes(1010)] == ["small", "tiny"]
    assert report.keep_for_bytes(0) == ()


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_a_kl_budget_must_be_positive(budget: float) -> None:
    with pytest.raises(OptionError, match="must be above 0"):
        _report(("layer", 0.1, 10)).keep_for_kl(budget)


def test_the_recipe_keeps_them_in_16_bit(
    measured: SensitivityReport, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Recipe(language_model="int8", overrides={"model.layers.0.*": "fp8"})
    kept = keep_in_recipe(recipe, measured.keep_for_kl(measured.together.kl / 2))
    kept.write(tmp_path / "recipe.toml")
    quantization = Recipe.read(tmp_path / "recipe.toml").resolve(
        Checkpoint.open(tiny_checkpoint).config
    )
    assert SPOILED not in quantization.linears
    assert quantization.scheme("model.layers.1.mlp.up_proj") is LinearScheme.INT8
    assert quantization.scheme("model.layers.0.mlp.up_proj") is LinearScheme.FP8
