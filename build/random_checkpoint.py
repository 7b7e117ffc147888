"""Checkpoints of published sizes with random weights: for timing, where the words do not matter."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from framesink.runtime.models.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from framesink.runtime.models.config import ModelConfig, parse_config
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
    TensorRule,
    cache_tensors,
    optional_cache_tensors,
    quantizable_linears,
    tensor_rules,
)
from framesink.runtime.models.safetensors_writer import SafetensorsWriter

_BLOCK_ELEMENTS = 1 << 22
_DEVIATION = 0.02  # the initializer_range of the published configurations
# Random codes fill their format to six standard deviations; inputs are taken to stay below 10.
_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
_LARGEST_CACHED = {CacheScheme.FP8: 448.0, CacheScheme.INT8: 127.0}
_DEVIATIONS = 6.0
_INPUT_AMAX = 10.0

# The special tokens of Qwen2.5-VL in the order of their ids.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_ORDINARY_TOKENS = 151_643

_VISION_LARGE = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
# Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct, and something for a quick look.
SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            **_VISION_LARGE,
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": 128,
        },
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {**_VISION_LARGE, "out_hidden_size": 2048},
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {**_VISION_LARGE, "out_hidden_size": 3584},
    },
}


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """A tensor drawn from a normal distribution and clipped to ±`largest`, if that is given; a
    `deviation` of 0 makes every number `mean`. `dtype` is numpy's or ml_dtypes' name."""

    dtype: str
    shape: tuple[int, ...]
    mean: float
    deviation: float
    largest: float | None = None


def write_random_checkpoint(
    size: str, directory: Path, *, scheme: LinearScheme = LinearScheme.UNQUANTIZED, seed: int = 0
) -> None:
    """Write a Qwen2.5-VL checkpoint of the sizes `SIZES[size]`, weights drawn from a normal
    distribution, with a tokenizer of bytes and Qwen's special tokens.

    Weights are bf16; those of the blocks' linear layers are codes of `scheme` (16-bit, FP8 or INT8
    W8A8, INT8 weight-only), as `framesink calibrate` would leave them, but with scales that were
    measured on nothing. Memory stays at a few megabytes whatever the size.

    Raises ValueError for INT4, whose packed codes are not made here.
    """
    if scheme is LinearScheme.INT4_WEIGHT_ONLY:
        raise ValueError("Random checkpoints are made in 16-bit, FP8 or INT8, not in INT4.")
    config = write_random_description(size, directory)
    quantization = quantize_blocks(config, scheme)
    if quantization.linears:
        quantization.write(directory)
    _write_weights(random_tensors(config, quantization), directory / WEIGHTS_NAME, seed)


def write_random_description(size: str, directory: Path) -> ModelConfig:
    """Write all of such a checkpoint but its weights: config and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = SIZES[size]
    special = min(_QWEN_ORDINARY_TOKENS, sizes["vocab_size"] - len(SPECIAL_TOKENS))
    tokens = {name: special + index for index, name in enumerate(SPECIAL_TOKENS)}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        **sizes,
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    _make_tokenizer(special).save(str(directory / "tokenizer.json"))
    return parse_config(config)


def quantize_blocks(config: ModelConfig, scheme: LinearScheme) -> Quantization:
    """Every linear layer of the blocks in `scheme`, the others in 16 bits."""
    if scheme is LinearScheme.UNQUANTIZED:
        return Quantization()
    return Quantization(
        {
            name: scheme
            for name in quantizable_linears(config)
            if name.startswith(("model.layers.", "visual.blocks."))
        }
    )


def _make_tokenizer(ordinary: int) -> Tokenizer:
    """One token per byte, fillers up to `ordinary` tokens, then the special tokens."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<|filler_{index}|>" for index in range(len(names), ordinary)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    return tokenizer


def random_tensors(config: ModelConfig, quantization: Quantization) -> dict[str, RandomTensor]:
    """What every tensor of such a checkpoint is drawn from, by canonical name."""
    rules, _ = tensor_rules(config, quantization)
    cache = quantization.cache
    cached = cache_tensors(config.text, cache) | optional_cache_tensors(config.text, cache)
    tensors = {
        name: RandomTensor("float32", rule.shapes[0], _INPUT_AMAX / _LARGEST_CACHED[cache], 0.0)
        for name, rule in cached.items()
    }
    others = [name for name in rules if name not in cached]
    return tensors | {name: _random_tensor(name, rules) for name in others}


def _random_tensor(name: str, rules: Mapping[str, TensorRule]) -> RandomTensor:
    rule = rules[name]
    dtype, shape = _dtype(rule), rule.shapes[0]
    if dtype == "float32":
        return RandomTensor(dtype, shape, mean=_scale(name, rules), deviation=0.0)
    largest = _LARGEST.get(dtype)
    deviation = _DEVIATION if largest is None else largest / _DEVIATIONS
    is_norm = len(shape) == 1 and name.endswith("weight")
    return RandomTensor(dtype, shape, mean=float(is_norm), deviation=deviation, largest=largest)


def _write_weights(tensors: Mapping[str, RandomTensor], path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name, tensor in tensors.items():
            elements = math.prod(tensor.shape)
            for start in range(0, elements, _BLOCK_ELEMENTS):
                block = random.standard_normal(
                    min(_BLOCK_ELEMENTS, elements - start), dtype=np.float32
                )
                block *= tensor.deviation
                block += tensor.mean
                if tensor.largest is not None:
                    np.clip(block, -tensor.largest, tensor.largest, out=block)
                writer.write(name, block.astype(np.dtype(tensor.dtype)))


def _dtype(rule: TensorRule) -> str:
    """What a tensor is written as: bf16 where the model may have any float."""
    return "bfloat16" if "bfloat16" in rule.dtypes else rule.dtypes[0]


def _scale(name: str, rules: Mapping[str, TensorRule]) -> float:
    """The scale of random codes, or of the inputs they are multiplied with."""
    linear, _, kind = name.rpartition(".")
    largest = _LARGEST[_dtype(rules[f"{linear}.weight"])]
    return (_INPUT_AMAX if kind == "input_scale" else _DEVIATION * _DEVIATIONS) / largest
