"""Names and shapes of every weight of each model part.

The canonical names are those of the published checkpoints (`visual.…`, `model.…`,
`lm_head.weight`). transformers 5 nests them under `model.visual.…` and `model.language_model.…`;
`canonical_name` maps either onto the first.
"""

from framesink.runtime.models.config import ModelConfig, TextConfig, VisionConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
PATCH_EMBED = "visual.patch_embed.proj.weight"
MERGER = "visual.merger"


def layer_name(index: int) -> str:
    """Prefix of a decoder layer's weights."""
    return f"model.layers.{index}"


def block_name(index: int) -> str:
    """Prefix of a vision block's weights."""
    return f"visual.blocks.{index}"


def output_projection(config: TextConfig) -> str:
    """Name of the weight that makes logits: the embedding's own where the two are tied."""
    return EMBEDDING if config.tie_word_embeddings else LM_HEAD


def canonical_name(name: str) -> str:
    """The published checkpoints' name of a tensor of either naming."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def model_weights(config: ModelConfig) -> dict[str, Shape]:
    """Canonical name and shape of every weight of a checkpoint."""
    return {**language_model_weights(config.text), **vision_encoder_weights(config.vision)}


def language_model_weights(config: TextConfig) -> dict[str, Shape]:
    """Canonical name and shape of every weight of the language model, embedding included."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    for index in range(config.num_hidden_layers):
        layer = layer_name(index)
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            **_linear(f"{layer}.self_attn.q_proj", query, hidden),
            **_linear(f"{layer}.self_attn.k_proj", key_value, hidden),
            **_linear(f"{layer}.self_attn.v_proj", key_value, hidden),
            **_linear(f"{layer}.self_attn.o_proj", hidden, query, bias=False),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            **_linear(f"{layer}.mlp.gate_proj", inner, hidden, bias=False),
            **_linear(f"{layer}.mlp.up_proj", inner, hidden, bias=False),
            **_linear(f"{layer}.mlp.down_proj", hidden, inner, bias=False),
        }
    shapes[output_projection(config)] = (config.vocab_size, hidden)
    return shapes


def vision_encoder_weights(config: VisionConfig) -> dict[str, Shape]:
    """Canonical name and shape of every weight of the vision encoder."""
    hidden, inner = config.hidden_size, config.intermediate_size
    merged = hidden * config.merge_unit
    patch = config.patch_size
    shapes: dict[str, Shape] = {
        PATCH_EMBED: (hidden, config.in_channels, config.temporal_patch_size, patch, patch)
    }
    for index in range(config.depth):
        block = block_name(index)
        shapes |= {
            f"{block}.norm1.weight": (hidden,),
            **_linear(f"{block}.attn.qkv", 3 * hidden, hidden),
            **_linear(f"{block}.attn.proj", hidden, hidden),
            f"{block}.norm2.weight": (hidden,),
            **_linear(f"{block}.mlp.gate_proj", inner, hidden),
            **_linear(f"{block}.mlp.up_proj", inner, hidden),
            **_linear(f"{block}.mlp.down_proj", hidden, inner),
        }
    return shapes | {
        f"{MERGER}.ln_q.weight": (hidden,),
        **_linear(f"{MERGER}.mlp.0", merged, merged),
        **_linear(f"{MERGER}.mlp.2", config.out_hidden_size, merged),
    }


def _linear(name: str, rows: int, columns: int, *, bias: bool = True) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight
