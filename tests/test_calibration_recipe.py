"""Recipes: written, read, and resolved to the layers of a model."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framesink.calibration.recipe import CACHE_SCHEMES, LINEAR_SCHEMES, Recipe
from framesink.runtime.errors import OptionError, OutputError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import CacheScheme, LinearScheme, check_quantization

printable = st.characters(codec="utf-8", exclude_categories=["Cc"])
precisions = st.sampled_from(list(LINEAR_SCHEMES))


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return Checkpoint.open(tiny_checkpoint).config


@given(
    recipe=st.builds(
        Recipe,
        language_model=precisions,
        head=precisions,
        vision_encoder=precisions,
        kv_cache=st.sampled_from(list(CACHE_SCHEMES)),
        smoothquant_alpha=st.floats(0, 1) | st.just("search"),
        overrides=st.dictionaries(st.text(printable, max_size=20), precisions, max_size=3),
    )
)
def test_what_is_written_is_read_back(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    recipe.write(path)
    assert Recipe.read(path) == recipe
    assert list(Recipe.read(path).overrides) == list(recipe.overrides)


def test_defaults_per_part_leave_head_and_merger_alone(config: ModelConfig) -> None:
    quantization = Recipe(language_model="int8", vision_encoder="fp8", kv_cache="int8").resolve(
        config
    )
    check_quantization(config, quantization)
    assert quantization.cache is CacheScheme.INT8
    assert "lm_head" not in quantization.linears
    assert not any("merger" in name for name in quantization.linears)
    for name, scheme in quantization.linears.items():
        visual = name.startswith("visual.")
        assert scheme is (LinearScheme.FP8 if visual else LinearScheme.INT8)
    # 7 linear layers per decoder layer, 5 per vision block.
    assert len(quantization.linears) == 7 * config.text.num_hidden_layers + 5 * config.vision.depth


def test_the_head_is_asked_for_by_itself(config: ModelConfig) -> None:
    quantization = Recipe(language_model="fp16", head="int8").resolve(config)
    check_quantization(config, quantization)
    assert quantization.linears == {"lm_head": LinearScheme.INT8}
    tied = replace(config, text=replace(config.text, tie_word_embeddings=True))
    assert Recipe(language_model="int8").resolve(tied).linears
    with pytest.raises(OptionError, match="cannot be int8; leave out --head-precision"):
        Recipe(head="int8").resolve(tied)


def test_the_last_override_that_matches_counts(config: ModelConfig) -> None:
    quantization = Recipe(
        language_model="fp8",
        overrides={
            "model.layers.1.*": "fp16",
            "model.layers.*.mlp.down_proj": "int8-weight-only",
            "lm_head": "fp8",
            "visual.merger.mlp.?": "int8",
        },
    ).resolve(config)
    assert quantization.scheme("model.layers.1.mlp.up_proj") is LinearScheme.UNQUANTIZED
    assert quantization.scheme("model.layers.1.mlp.down_proj") is LinearScheme.INT8_WEIGHT_ONLY
    assert quantization.scheme("model.layers.0.mlp.up_proj") is LinearScheme.FP8
    assert quantization.scheme("lm_head") is LinearScheme.FP8
    assert quantization.scheme("visual.merger.mlp.2") is LinearScheme.INT8
    assert quantization.scheme("visual.blocks.0.attn.qkv") is LinearScheme.UNQUANTIZED


def test_int4_needs_whole_groups(config: ModelConfig) -> None:
    quantization = Recipe(language_model="int4-weight-only").resolve(config)
    check_quantization(config, quantization)
    # Of the tiny model only down_proj has 128 inputs, the others 64.
    for name, scheme in quantization.linears.items():
        whole = name.endswith("down_proj")
        expected = LinearScheme.INT4_WEIGHT_ONLY if whole else LinearScheme.INT8_WEIGHT_ONLY
        assert scheme is expected


def test_an_override_that_matches_nothing_is_refused(config: ModelConfig) -> None:
    with pytest.raises(OptionError, match=r"'model\.layers\.99\.\*' matches no linear layer"):
        Recipe(overrides={"model.layers.99.*": "fp16"}).resolve(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("language_model = ", "not valid TOML"),
        ('language_modell = "fp8"', "wrong at language_modell"),
        ('kv_cache = "int4-weight-only"', "wrong at kv_cache"),
        ("smoothquant_alpha = 1.5", "wrong at smoothquant_alpha"),
        ('[overrides]\n"lm_head" = "fp9"', "wrong at overrides.lm_head"),
        ("\x00\xff", "not valid TOML"),
    ],
)
def test_a_malformed_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(OptionError, match=message):
        Recipe.read(path)


def test_recipe_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        Recipe.read(tmp_path / "absent.toml")
    with pytest.raises(OutputError, match="Is a directory"):
        Recipe().write(tmp_path)
