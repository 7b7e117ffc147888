"""A fast, batched forward pass over the parameters of transformers' Qwen2.5-VL, for training.

transformers loops over the vision encoder's windows and knows nothing of eviction. Here the picture
has one fixed grid, so windows are a reshape, and the language model takes its context as rows that
were computed earlier: keys before RoPE, rotated afresh for the positions of every chunk
(StreamingVLM, arXiv 2510.09608). `tests/test_demo_model.py` compares both with transformers.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional

from demo.scene import SIDE, STEPS_PER_CHUNK
from framesink.runtime.preprocess import CLIP_MEAN, CLIP_STD

Weights: TypeAlias = Mapping[str, torch.Tensor]

EMBEDDING = "model.language_model.embed_tokens.weight"
PATCH_SIZE = 14
MERGE = 2
GRID = SIDE // PATCH_SIZE // MERGE  # merged patches along a side: 4
VISION_TOKENS = GRID * GRID
WINDOW = 2  # merged patches along a side of an attention window


class Sizes(NamedTuple):
    """The sizes `forward` needs; field names are those of transformers' configuration."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    vision_depth: int
    vision_num_heads: int
    fullatt_block_indexes: tuple[int, ...]


def to_patches(frames: torch.Tensor) -> torch.Tensor:
    """Frames `[N, 2, 112, 112, 3]` in 0 to 255 to normalised patches `[N, 64, 1176]`.

    The order is that of `framesink.runtime.preprocess.patchify`.
    """
    mean = torch.tensor(CLIP_MEAN, device=frames.device) * 255
    std = torch.tensor(CLIP_STD, device=frames.device) * 255
    pixels = (frames.float() - mean) / std
    blocks = pixels.view(-1, STEPS_PER_CHUNK, GRID, MERGE, PATCH_SIZE, GRID, MERGE, PATCH_SIZE, 3)
    ordered = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(len(frames), GRID * GRID * MERGE * MERGE, -1)


def encode_vision(
    weights: Weights,
    sizes: Sizes,
    patches: torch.Tensor,
    block: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Patches `[N, 64, 1176]` to embeddings `[N, 16, hidden]`.

    `block` is `vision_block`, perhaps compiled.
    """
    count, heads = len(patches), sizes.vision_num_heads
    kernel = weights["model.visual.patch_embed.proj.weight"]
    hidden = functional.linear(_to_windows(patches.to(kernel.dtype)), kernel.flatten(1))
    cos, sin = _vision_rotary(hidden.shape[-1] // heads, hidden.device, hidden.dtype)
    for index in range(sizes.vision_depth):
        own = layer_weights(weights, f"model.visual.blocks.{index}.")
        full = index in sizes.fullatt_block_indexes
        hidden = (block or vision_block)(own, heads, full, hidden, cos, sin)
    normed = norm(hidden, weights["model.visual.merger.ln_q.weight"], 1e-6)
    merged = normed.reshape(count, VISION_TOKENS, -1)
    merged = functional.gelu(linear(weights, "model.visual.merger.mlp.0", merged))
    return _from_windows(linear(weights, "model.visual.merger.mlp.2", merged))


def vision_block(
    weights: Weights,
    heads: int,
    full: bool,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """One block of the vision encoder on patches in window order; attends in windows or in full."""
    count, length, width = hidden.shape
    normed = norm(hidden, weights["norm1.weight"], 1e-6)
    joint = linear(weights, "attn.qkv", normed).view(count, length, 3, heads, width // heads)
    query, key, value = joint.unbind(2)
    group = length if full else (WINDOW * MERGE) ** 2
    attended = functional.scaled_dot_product_attention(
        *(
            states.reshape(-1, group, heads, width // heads).transpose(1, 2)
            for states in (rotate(query, cos, sin), rotate(key, cos, sin), value)
        )
    )
    attended = attended.transpose(1, 2).reshape(count, length, width)
    hidden = hidden + linear(weights, "attn.proj", attended)
    return hidden + mlp(weights, "mlp", norm(hidden, weights["norm2.weight"], 1e-6))


def embed(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Token embeddings; negative ids (padding) count as token 0."""
    return functional.embedding(ids.clamp(min=0), weights[EMBEDDING])


def rotary(
    sizes: Sizes, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[B, n, head_dim]` of M-RoPE positions `[B, 3, n]`."""
    half = sizes.head_dim // 2
    device = positions.device
    exponents = torch.arange(half, device=device, dtype=torch.float32) / half
    frequencies = sizes.rope_theta**-exponents
    axis = torch.repeat_interleave(
        torch.arange(3, device=device),
        torch.tensor(sizes.mrope_section, device=device),
        output_size=half,
    )
    angles = positions.float()[:, axis].transpose(1, 2) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Context(NamedTuple):
    """Rows computed earlier: keys already rotated, `[B, layers · kv_heads, m, head_dim]` each."""

    keys: torch.Tensor
    values: torch.Tensor


def rotate_context(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Context:
    """Rotate the keys of stored rows `[B, 2 · layers · kv_heads, m, head_dim]` (keys first)."""
    keys, values = rows.chunk(2, dim=1)
    return Context(rotate(keys, cos[:, None], sin[:, None]), values)


def language_model(
    weights: Weights,
    sizes: Sizes,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
    context: Context | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run new tokens `[B, n, hidden]` after a context of m rows.

    `bias` `[B, n, m + n]` is added to the attention scores. Returns the last hidden states before
    the final norm, and the new rows `[B, 2 · layers · kv_heads, n, head_dim]`: keys before RoPE,
    then values.
    """
    kv_heads = sizes.num_key_value_heads
    group = sizes.num_attention_heads // kv_heads
    cos, sin = cos[:, None], sin[:, None]
    # The queries that share a K/V head are stacked along the length, so that K and V need no copy.
    bias = bias.repeat(1, group, 1)[:, None].expand(-1, kv_heads, -1, -1)
    new_keys, new_values = [], []
    for index in range(sizes.num_hidden_layers):
        heads = slice(index * kv_heads, (index + 1) * kv_heads)
        seen = None if context is None else (context.keys[:, heads], context.values[:, heads])
        layer = layer_weights(weights, f"model.language_model.layers.{index}.")
        hidden, key, value = decoder_layer(layer, sizes, hidden, cos, sin, bias, seen)
        new_keys.append(key)
        new_values.append(value)
    return hidden, torch.cat((*new_keys, *new_values), dim=1)


def decoder_layer(
    weights: Weights,
    sizes: Sizes,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer; `weights` are named from the layer on. Returns its output, new keys and values."""
    batch, length, _ = hidden.shape
    kv_heads, head_dim = sizes.num_key_value_heads, sizes.head_dim
    normed = norm(hidden, weights["input_layernorm.weight"], sizes.rms_norm_eps)
    query, key, value = (
        linear(weights, f"self_attn.{part}_proj", normed)
        .view(batch, length, -1, head_dim)
        .transpose(1, 2)
        for part in "qkv"
    )
    rotated_query, keys, values = rotate(query, cos, sin), rotate(key, cos, sin), value
    if context is not None:
        keys = torch.cat((context[0], keys), dim=2)
        values = torch.cat((context[1], values), dim=2)
    attended = functional.scaled_dot_product_attention(
        rotated_query.reshape(batch, kv_heads, -1, head_dim), keys, values, attn_mask=bias
    )
    attended = attended.reshape(batch, -1, length, head_dim).transpose(1, 2).flatten(2)
    hidden = hidden + linear(weights, "self_attn.o_proj", attended)
    normed = norm(hidden, weights["post_attention_layernorm.weight"], sizes.rms_norm_eps)
    return hidden + mlp(weights, "mlp", normed), key, value


def logits(weights: Weights, sizes: Sizes, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states, through the tied embedding."""
    normed = norm(hidden, weights["model.language_model.norm.weight"], sizes.rms_norm_eps)
    return functional.linear(normed, weights[EMBEDDING])


def layer_weights(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin with `prefix`, named without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm."""
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def linear(weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """The named linear layer, with its bias if it has one."""
    return functional.linear(hidden, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def mlp(weights: Weights, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """The named gated feed-forward part."""
    gate = functional.silu(linear(weights, f"{name}.gate_proj", hidden))
    return linear(weights, f"{name}.down_proj", gate * linear(weights, f"{name}.up_proj", hidden))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys to their positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def _to_windows(patches: torch.Tensor) -> torch.Tensor:
    """Order patches `[N, 64, d]` so that those of one attention window are consecutive."""
    side = GRID // WINDOW
    units = patches.view(-1, side, WINDOW, side, WINDOW, MERGE * MERGE, patches.shape[-1])
    return units.transpose(2, 3).reshape(patches.shape)


def _from_windows(units: torch.Tensor) -> torch.Tensor:
    """Undo `_to_windows` for merged patches `[N, 16, d]`."""
    side = GRID // WINDOW
    return (
        units.view(-1, side, side, WINDOW, WINDOW, units.shape[-1])
        .transpose(2, 3)
        .reshape(units.shape)
    )


def _vision_rotary(
    head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[64, 1, head_dim]` of the patches' rows and columns, in window order."""
    quarter = head_dim // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, device=device) / quarter)
    axis = torch.arange(GRID * MERGE, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    blocks = grid.view(GRID, MERGE, GRID, MERGE, 2).transpose(1, 2).reshape(1, -1, 2)
    angles = (_to_windows(blocks)[0, :, :, None] * frequencies).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
