"""A randomly initialised Qwen2.5-VL checkpoint that is tiny and yet says varied things."""

import json
from pathlib import Path

from reference.tiny_tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer

VOCABULARY_SIZE = 600
MIN_PIXELS = 56 * 56
MAX_PIXELS = 112 * 112
PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "max_pixels": MAX_PIXELS,
    "merge_size": 2,
    "min_pixels": MIN_PIXELS,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "temporal_patch_size": 2,
}


def write_tiny_checkpoint(directory: Path, *, seed: int = 7) -> None:
    """Write the checkpoint with transformers' own class, config and `save_pretrained`, in float32.

    The weights are larger than a fresh model's, so that every token depends on its whole context
    and logits are well apart; K has a large bias, as Qwen2.5's has. `<|im_end|>` and ` ...` are
    made likely, the former most of all after the latter, so that replies end, and some are silent;
    the other special tokens are never said. Every weight is a float16 number too, so that a bundle
    that stores float16 holds the same model.
    """
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(VOCABULARY_SIZE)
    write_tokenizer(tokenizer, directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))

    turn_end = tokenizer.token_to_id("<|im_end|>")
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    (closing,) = tokenizer.encode(" ...").ids
    (newline,) = tokenizer.encode("\n").ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": end_of_text,
            "eos_token_id": turn_end,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, deviation: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * deviation

    def unit(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.norm()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.copy_(normal(parameter.shape, 2.0))
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter.shape, 0.3))
            elif "norm" in name or name.endswith("ln_q.weight"):
                parameter.copy_(1.0 + normal(parameter.shape, 0.2))
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(normal(parameter.shape, 0.7))
            elif name.endswith("lm_head.weight"):
                parameter.copy_(normal(parameter.shape, 4.0 * parameter.shape[1] ** -0.5))
            else:
                inputs = parameter[0].numel()
                parameter.copy_(normal(parameter.shape, 1.2 * inputs**-0.5))
        head = model.lm_head.weight
        for token in SPECIAL_TOKENS:
            if token not in ("<|im_end|>", "<|endoftext|>"):
                head[tokenizer.token_to_id(token)] = 0.0
        # The residual stream carries a token's embedding to the head: there, a newline (the end
        # of `assistant\n`) points at ` ...`, and ` ...` at `<|im_end|>`.
        embeddings = model.model.language_model.embed_tokens.weight
        head[closing] = 3.0 * head[closing] + 8.0 * unit(embeddings[newline])
        head[turn_end] *= 2.0
        embeddings[closing] = 6.0 * unit(head[turn_end])
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    model.generation_config.bos_token_id = end_of_text
    model.generation_config.eos_token_id = [turn_end, end_of_text]
    model.generation_config.pad_token_id = end_of_text
    model.save_pretrained(directory)
