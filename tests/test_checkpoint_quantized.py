"""Quantized checkpoints: what is read of them, and one clear sentence for all that is off."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference.quantized_checkpoint import write_quantized_checkpoint

from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import (
    QUANTIZATION_NAME,
    CacheScheme,
    LinearScheme,
    Quantization,
    quantizable_linears,
    read_quantization,
)
from framesink.runtime.models.safetensors_writer import SafetensorsWriter

SCHEMES = [scheme for scheme in LinearScheme if scheme is not LinearScheme.UNQUANTIZED]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantized")
    for scheme in SCHEMES:
        write_quantized_checkpoint(
            tiny_checkpoint, directory / scheme.value, scheme, CacheScheme.INT8
        )
    return directory


@pytest.fixture
def checkpoint(quantized: Path, tmp_path: Path) -> Callable[[LinearScheme], Path]:
    """Copies that a test may damage."""
    return lambda scheme: Path(shutil.copytree(quantized / scheme.value, tmp_path / "checkpoint"))


def rewrite(checkpoint: Path, **changes: NDArray[np.generic] | None) -> None:
    """Replace or (None) remove tensors of a checkpoint."""
    opened = Checkpoint.open(checkpoint)
    tensors = {name: np.array(opened.read(name)) for name in opened.names()} | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    layout = {name: (value.dtype.name, value.shape) for name, value in kept.items()}
    with SafetensorsWriter(checkpoint / "model.safetensors", layout) as writer:
        for name, value in kept.items():
            writer.write(name, value)


def rewrite_description(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / QUANTIZATION_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(directory: Path) -> str:
    """The sentence a checkpoint is refused with."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_a_plain_checkpoint_has_no_quantization(tiny_checkpoint: Path) -> None:
    assert Checkpoint.open(tiny_checkpoint).quantization is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_where_the_scheme_says(scheme: LinearScheme, quantized: Path) -> None:
    opened = Checkpoint.open(quantized / scheme.value)
    assert opened.quantization is not None
    assert opened.quantization.scheme(LAYER) is scheme
    assert opened.quantization.scheme("lm_head") is LinearScheme.UNQUANTIZED
    assert opened.quantization.cache is CacheScheme.INT8
    bits = 8 * opened.info(f"{LAYER}.weight").nbytes
    count = math.prod(quantizable_linears(opened.config)[LAYER])
    assert bits == count * (4 if scheme is LinearScheme.INT4_WEIGHT_ONLY else 8)


linear_names = st.text(min_size=1, max_size=20).filter(lambda name: not name.startswith("model."))


@given(
    linears=st.dictionaries(linear_names, st.sampled_from(LinearScheme), max_size=5),
    cache=st.sampled_from(CacheScheme),
    group=st.integers(1, 64).map(lambda count: 16 * count),
)
def test_a_description_is_read_as_it_was_written(
    linears: dict[str, LinearScheme],
    cache: CacheScheme,
    group: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("description")
    quantization = Quantization(linears, cache, group)
    quantization.write(directory)
    assert read_quantization(directory) == quantization


def test_either_naming_of_a_layer_is_read(tmp_path: Path) -> None:
    nested = "model.language_model.layers.1.mlp.up_proj"
    Quantization({nested: LinearScheme.FP8}).write(tmp_path)
    read = read_quantization(tmp_path)
    assert read is not None
    assert read.scheme(LAYER) is LinearScheme.FP8


# What is refused.


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_a_description_that_is_none(
    content: bytes, checkpoint: Callable[[LinearScheme], Path]
) -> None:
    directory = checkpoint(LinearScheme.INT8)
    (directory / QUANTIZATION_NAME).write_bytes(content)
    assert f"{QUANTIZATION_NAME} is malformed" in refusal(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linears": {LAYER: "fp3"}}, "fp3' or|int8_weight_only"),
        ({"cache": "int2"}, "cache"),
        ({"int4_group": 0}, "int4_group"),
        ({"int4_group": "128"}, "int4_group"),
        ({"surprise": 1}, "surprise"),
        ({"linears": {"model.layers.99.mlp.up_proj": "int8"}}, "no linear layer"),
        ({"linears": {"model.embed_tokens": "int8"}}, "no linear layer"),
        ({"linears": {"model.norm": "int8"}}, "no linear layer"),
        ({"linears": {"visual.patch_embed.proj": "int8"}}, "no linear layer"),
    ],
)
def test_a_description_of_something_else(
    changes: dict[str, object], words: str, checkpoint: Callable[[LinearScheme], Path]
) -> None:
    directory = checkpoint(LinearScheme.INT8)
    rewrite_description(directory, **changes)
    assert any(word in refusal(directory) for word in words.split("|"))


def test_groups_that_do_not_divide_the_inputs(checkpoint: Callable[[LinearScheme], Path]) -> None:
    directory = checkpoint(LinearScheme.INT4_WEIGHT_ONLY)
    rewrite_description(directory, int4_group=128)
    sentence = refusal(directory)
    assert "groups of 128" in sentence
    assert "int8_weight_only" in sentence


def test_codes_without_a_description(checkpoint: Callable[[LinearScheme], Path]) -> None:
    directory = checkpoint(LinearScheme.FP8)
    (directory / QUANTIZATION_NAME).unlink()
    sentence = refusal(directory)
    assert "float8_e4m3fn" in sentence
    assert f"no {QUANTIZATION_NAME}" in sentence


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_description_without_codes(
    scheme: LinearScheme, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    Quantization({LAYER: scheme}, int4_group=16).write(directory)
    assert LAYER in refusal(directory)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.weight_scale",
        f"{LAYER}.input_scale",
        "model.layers.2.self_attn.k_proj.k_channel_scale",
        "model.layers.2.self_attn.v_proj.v_head_scale",
    ],
)
def test_a_scale_that_is_missing_or_misshapen(
    name: str, checkpoint: Callable[[LinearScheme], Path]
) -> None:
    directory = checkpoint(LinearScheme.INT8)
    rewrite(directory, **{name: np.ones((3, 5), np.float32)})
    assert f"{name} has shape [3, 5]" in refusal(directory)
    shutil.rmtree(directory)
    directory = checkpoint(LinearScheme.INT8)
    rewrite(directory, **{name: None})
    assert f"no tensor {name}" in refusal(directory)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e9])
@pytest.mark.parametrize("name", ["weight_scale", "pre_quant_scale"])
def test_a_scale_that_is_no_scale(
    value: float, name: str, checkpoint: Callable[[LinearScheme], Path]
) -> None:
    """float16 would make 0 or infinity of the last two."""
    directory = checkpoint(LinearScheme.INT8)
    opened = Checkpoint.open(directory)
    layer = next(n for n in opened.names() if n.endswith(name)).removesuffix(f".{name}")
    scales = np.array(opened.read(f"{layer}.{name}"))
    scales[1] = value
    rewrite(directory, **{f"{layer}.{name}": scales})
    sentence = refusal(directory)
    assert f"{layer}.{name}" in sentence
    assert "float16" in sentence


def test_codes_of_another_type(checkpoint: Callable[[LinearScheme], Path]) -> None:
    directory = checkpoint(LinearScheme.INT8)
    codes = np.array(Checkpoint.open(directory).read(f"{LAYER}.weight"))
    rewrite(directory, **{f"{LAYER}.weight": codes.astype(ml_dtypes.float8_e4m3fn)})
    sentence = refusal(directory)
    assert f"{LAYER}.weight is of dtype float8_e4m3fn" in sentence
    assert "int8" in sentence
