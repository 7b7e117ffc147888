"""Checkpoint reading: layouts, names, shards, and one clear sentence for all that is off."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import parse_config
from framesink.runtime.models.weights import canonical_name

# config.json of Qwen/Qwen2.5-VL-3B-Instruct, as published (written by transformers 4.41).
PUBLISHED_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def rewrite_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_tensors(
    checkpoint: Path, change: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]
) -> None:
    path = checkpoint / "model.safetensors"
    tensors = {name: np.array(array) for name, array in load_file(path).items()}
    save_file(change(tensors), path)


def refusal(directory: Path) -> str:
    """The sentence a checkpoint is refused with."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def shard(checkpoint: Path, parts: int) -> dict[str, str]:
    """Split the weights into shards with an index; returns its weight map."""
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weight_map = {
        name: f"model-{index % parts + 1:05}-of-{parts:05}.safetensors"
        for index, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, checkpoint / file)
    write_index(checkpoint, weight_map)
    return weight_map


def write_index(checkpoint: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


# Configuration.


def test_the_published_flat_config_means_what_transformers_reads_in_it() -> None:
    from transformers import Qwen2_5_VLConfig

    expected = Qwen2_5_VLConfig(**json.loads(json.dumps(PUBLISHED_3B)))
    text = expected.text_config
    config = parse_config(PUBLISHED_3B)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(config.text, name) == getattr(text, name)
    assert config.text.num_key_value_heads == text.num_key_value_heads
    assert config.text.head_dim == 128
    assert config.text.rope_theta == text.rope_parameters["rope_theta"]
    assert list(config.text.mrope_section) == text.rope_parameters["mrope_section"]
    assert config.text.tie_word_embeddings is expected.tie_word_embeddings is True
    for name in ("depth", "hidden_size", "intermediate_size", "out_hidden_size", "window_size"):
        assert getattr(config.vision, name) == getattr(expected.vision_config, name)
    assert list(config.vision.fullatt_block_indexes) == expected.vision_config.fullatt_block_indexes
    assert config.vision.patch_dim == 1176
    assert config.video_token_id == expected.video_token_id


def test_both_config_layouts_are_the_same_model(checkpoint: Path) -> None:
    nested = json.loads((checkpoint / "config.json").read_text())
    text = dict(nested["text_config"])
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in nested.items() if key != "text_config"}
    flat |= {key: value for key, value in text.items() if key != "model_type"}
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    assert parse_config(flat) == parse_config(nested)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "supported is qwen2_5_vl"]),
        ({"model_type": None}, ["supported is qwen2_5_vl"]),
        ({"hidden_size": "2048"}, ["hidden_size", "'2048'", "integer"]),
        ({"hidden_size": 2050}, ["16 attention heads", "2050"]),
        ({"num_key_value_heads": 3}, ["3 key/value heads"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"vocab_size": None}, ["vocab_size", "missing"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps", "positive"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"rope_scaling": None}, ["rope_scaling", "missing"]),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, ["'yarn'"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, ["mrope_section", "64"]),
        ({"vision_config": [1]}, ["vision_config", "object"]),
        ({"vision_config": {**PUBLISHED_3B["vision_config"], "depth": 4}}, ["beyond its 4 blocks"]),
        ({"vision_config": {**PUBLISHED_3B["vision_config"], "num_heads": 3}}, ["3 heads"]),
        ({"vision_config": {**PUBLISHED_3B["vision_config"], "window_size": 14}}, ["window_size"]),
        (
            {
                "vision_config": {
                    **PUBLISHED_3B["vision_config"],
                    "rope_parameters": {"rope_theta": 5.0},
                }
            },
            ["rope_parameters.rope_theta", "5.0"],
        ),
    ],
)
def test_a_config_it_cannot_run_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({**PUBLISHED_3B, **changes})
    for word in words:
        assert word in str(caught.value)


@settings(deadline=None)
@given(
    key=st.sampled_from(sorted({*PUBLISHED_3B, *PUBLISHED_3B["vision_config"]})),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=5,
    ),
)
def test_any_config_value_is_read_or_refused(key: str, value: object) -> None:
    config = json.loads(json.dumps(PUBLISHED_3B))
    place = config if key in config else config["vision_config"]
    place[key] = value
    try:
        parsed = parse_config(config)
    except CheckpointError:
        return
    assert parsed.text.head_dim == 2 * sum(parsed.text.mrope_section)


# Weights.


def test_every_tensor_reads_as_transformers_loads_it(tiny_checkpoint: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    opened = Checkpoint.open(tiny_checkpoint)
    state = {canonical_name(name): value.numpy() for name, value in model.state_dict().items()}
    assert set(opened.names()) == set(state)
    for name, expected in state.items():
        np.testing.assert_array_equal(opened.read(name), expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_shards_of_transformers(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=getattr(torch, dtype)
    )
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    opened = Checkpoint.open(tmp_path)
    assert len({opened.info(name).file for name in opened.names()}) > 1
    for name, value in model.state_dict().items():
        read = opened.read(canonical_name(name))
        assert read.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        np.testing.assert_array_equal(read.astype(np.float32), value.float().numpy())


def test_old_and_new_names_are_one(checkpoint: Path) -> None:
    before = Checkpoint.open(checkpoint)

    def rename(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        if name.startswith("model."):
            return f"model.language_model.{name.removeprefix('model.')}"
        return name

    expected = {name: np.array(before.read(name)) for name in before.names()}
    rewrite_tensors(checkpoint, lambda _: {rename(name): value for name, value in expected.items()})
    after = Checkpoint.open(checkpoint)
    for name, value in expected.items():
        np.testing.assert_array_equal(after.read(name), value)


def test_a_tied_head_needs_no_weight_of_its_own(checkpoint: Path) -> None:
    rewrite_tensors(
        checkpoint, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    )
    assert "lm_head.weight" in refusal(checkpoint)
    rewrite_config(checkpoint, tie_word_embeddings=True)
    assert Checkpoint.open(checkpoint).config.text.tie_word_embeddings


# What is refused.


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "no checkpoint directory" in refusal(tmp_path / "nothing")


def test_a_directory_without_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "config.json" in refusal(checkpoint)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":2}']
)
def test_a_config_that_is_no_json_object(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    assert "config.json is damaged" in refusal(checkpoint)


def test_a_directory_without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(checkpoint)


def test_pickled_weights_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    sentence = refusal(checkpoint)
    assert "pytorch_model.bin" in sentence
    assert "safe_serialization" in sentence


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file(checkpoint: Path, kept: float) -> None:
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    assert "model.safetensors is damaged" in refusal(checkpoint)


def test_a_misshapen_weight_is_named_with_both_shapes(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_tensors(checkpoint, lambda tensors: {**tensors, name: tensors[name][:-1]})
    sentence = refusal(checkpoint)
    assert name in sentence
    assert "[127, 64]" in sentence
    assert "[128, 64]" in sentence


def test_a_config_of_another_size_is_refused(checkpoint: Path) -> None:
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    rewrite_config(checkpoint, text_config={**text, "num_hidden_layers": 4})
    assert "model.layers.3." in refusal(checkpoint)


def test_integer_weights_are_refused(checkpoint: Path) -> None:
    name = "model.norm.weight"
    rewrite_tensors(checkpoint, lambda t: {**t, name: t[name].astype(np.int8)})
    assert re.search(r"model\.norm\.weight is of dtype int8", refusal(checkpoint))


def test_a_weight_under_both_names_is_refused(checkpoint: Path) -> None:
    rewrite_tensors(
        checkpoint,
        lambda t: {**t, "model.language_model.norm.weight": np.array(t["model.norm.weight"])},
    )
    assert "twice" in refusal(checkpoint)


def test_a_missing_shard(checkpoint: Path) -> None:
    weight_map = shard(checkpoint, 3)
    lost = next(iter(weight_map.values()))
    (checkpoint / lost).unlink()
    assert lost in refusal(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "", 3, None],
)
def test_a_shard_outside_of_the_directory(checkpoint: Path, name: object) -> None:
    weight_map: dict[str, object] = {**shard(checkpoint, 2)}
    weight_map["model.norm.weight"] = name
    write_index(checkpoint, weight_map)
    assert "own directory" in refusal(checkpoint)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map(checkpoint: Path, weight_map: object) -> None:
    shard(checkpoint, 2)
    write_index(checkpoint, weight_map)
    assert "weight_map" in refusal(checkpoint)


def test_an_index_that_names_the_wrong_shard(checkpoint: Path) -> None:
    weight_map = shard(checkpoint, 2)
    first, second = sorted(set(weight_map.values()))
    name = next(name for name, file in weight_map.items() if file == first)
    write_index(checkpoint, {**weight_map, name: second})
    assert f"places {name} in {second}" in refusal(checkpoint)
