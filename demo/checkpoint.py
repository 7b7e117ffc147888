"""The demo model's sizes, and its checkpoint directory as `transformers` lays it out."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo.forward import EMBEDDING, PATCH_SIZE, Sizes
from demo.scene import SIDE
from demo.tokenizer import write_tokenizer
from framesink.runtime.preprocess import CLIP_MEAN, CLIP_STD
from framesink.runtime.tokenizer import Tokenizer

WINDOW_SIZE = 56

# How a session of the demo runs unless told otherwise (fields of `StreamingDefaults`).
STREAMING = {
    "chunk_seconds": 1.0,
    "sink_text": 128,
    "recent_text": 256,
    "vision_seconds": 8.0,
    "reply_turns": 8,
    "max_new_tokens": 12,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "query": "Say what happens.",
}


def model_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL's architecture at 7.8 million parameters."""
    hidden = 256
    end = tokenizer.special("<|im_end|>")
    pad = tokenizer.special("<|endoftext|>")
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.vocabulary_size,
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": pad,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_heads": 6,
            "out_hidden_size": hidden,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": WINDOW_SIZE,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=tokenizer.special("<|image_pad|>"),
        video_token_id=tokenizer.special("<|video_pad|>"),
        vision_start_token_id=tokenizer.special("<|vision_start|>"),
        vision_end_token_id=tokenizer.special("<|vision_end|>"),
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
        tie_word_embeddings=True,
    )


def sizes_of(config: Qwen2_5_VLConfig) -> Sizes:
    """What the fast forward needs of a configuration."""
    text, vision = config.text_config, config.vision_config
    return Sizes(
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_parameters["rope_theta"],
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        vision_depth=vision.depth,
        vision_num_heads=vision.num_heads,
        fullatt_block_indexes=tuple(vision.fullatt_block_indexes),
    )


def write_checkpoint(weights: dict[str, torch.Tensor], directory: Path) -> None:
    """Write the whole checkpoint: configuration, fp16 weights, tokenizer, streaming defaults.

    `weights` are named as in the model's `state_dict`.
    """
    write_tokenizer(directory)
    tokenizer = Tokenizer.from_directory(directory)
    model = Qwen2_5_VLForConditionalGeneration(model_config(tokenizer))
    model.load_state_dict({**weights, "lm_head.weight": weights[EMBEDDING]})
    end = tokenizer.special("<|im_end|>")
    model.generation_config.eos_token_id = [end, tokenizer.special("<|endoftext|>")]
    model.generation_config.do_sample = False
    model.half().save_pretrained(directory)
    preprocessor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": SIDE * SIDE,
        "merge_size": 2,
        "min_pixels": SIDE * SIDE,
        "patch_size": PATCH_SIZE,
        "processor_class": "Qwen2_5_VLProcessor",
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"longest_edge": SIDE * SIDE, "shortest_edge": SIDE * SIDE},
        "temporal_patch_size": 2,
    }
    _write_json(directory / "preprocessor_config.json", preprocessor)
    _write_json(directory / "streaming_config.json", STREAMING)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
