"""A run of streamed turns in one parallel forward pass, exactly as if stepped one by one.

Eviction moves positions, but only in two ways. Turns inside the window keep their distances from
each other: seen from a query, they stand where they would without any eviction (the *window
frame*). The text before the window stands where it always stood, counted from the session's start
(the *text frame*). So every query is rotated twice, once per frame, keys once, and both scores come
from one product: query `[window | text]`, keys `[key | 0]` or `[0 | key]`. A mask says which turn
sees what. The one difference from stepping: the middle of a full `previous text` is cut at the end
of the run only.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional

from demo import forward
from demo.forward import Sizes, Weights
from demo.streaming import (
    State,
    Streamer,
    Turn,
    attention_bias,
    causal,
    embed_turns,
    text_places,
    text_range,
    turn_positions,
)
from demo.turns import EMPTY, OPENING_SLOTS, PART, PREFIX_SLOTS, REPLY_SLOTS, SLOTS

_ALIGNMENT = 8  # fused attention kernels want masks of such lengths
_CLOSING = PREFIX_SLOTS - OPENING_SLOTS
_WORDS = PART["words"].stop - PART["words"].start


class Rotary(NamedTuple):
    """cos and sin `[B, 1, n, head_dim]`."""

    cos: torch.Tensor
    sin: torch.Tensor


class Frames(NamedTuple):
    """Rotations and mask of a run: queries in both frames, keys of the turns (old and new), keys of
    the words that leave the window during the run, and the attention bias `[B, 1, n, m]`."""

    query_window: Rotary
    query_text: Rotary
    key_window: Rotary
    key_moved: Rotary
    bias: torch.Tensor


Layer: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def run_segment(
    streamer: Streamer,
    weights: Weights,
    prefix: Turn,
    state: State,
    ids: torch.Tensor,
    vision: torch.Tensor,
    layer: Layer | None = None,
) -> tuple[torch.Tensor, State]:
    """Run turns `[B, k, SLOTS]` with embeddings `[B, k, 16, hidden]` after a state.

    `layer` is `segment_layer`, perhaps compiled. Returns the hidden states of the reply slots
    `[B, k, REPLY_LENGTH, hidden]` and the state after the last turn.
    """
    sizes, count = streamer.sizes, ids.shape[1]
    hidden = embed_turns(weights, ids, vision)
    text, text_positions, frames = _frames(streamer, prefix, state, ids, hidden.dtype)
    text_context = forward.rotate_context(
        text, *forward.rotary(sizes, text_positions, hidden.dtype)
    )
    heads = sizes.num_key_value_heads
    old = state.rows.split(heads, dim=1)
    text_keys, text_values = (part.split(heads, dim=1) for part in text_context)
    new_keys, new_values = [], []
    layers = sizes.num_hidden_layers
    for index in range(layers):
        hidden, key, value = (layer or segment_layer)(
            forward.layer_weights(weights, f"model.language_model.layers.{index}."),
            sizes,
            hidden,
            frames,
            (old[index], old[layers + index]),
            (text_keys[index], text_values[index]),
        )
        new_keys.append(key)
        new_values.append(value)
    rows = torch.cat((*new_keys, *new_values), dim=1).detach()
    replies = hidden.unflatten(1, (count, SLOTS))[:, :, REPLY_SLOTS]
    return replies, streamer.advance(state, Turn(ids.flatten(1), rows))


def segment_layer(
    weights: Weights,
    sizes: Sizes,
    hidden: torch.Tensor,
    frames: Frames,
    old: tuple[torch.Tensor, torch.Tensor],
    text: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer over a run of turns. `old` are keys (before RoPE) and values of the turns before,
    `text` those of the text before the window, rotated. Returns output, new keys, new values."""
    batch, length, _ = hidden.shape
    head_dim = sizes.head_dim
    normed = forward.norm(hidden, weights["input_layernorm.weight"], sizes.rms_norm_eps)
    query, key, value = (
        forward.linear(weights, f"self_attn.{part}_proj", normed)
        .view(batch, length, -1, head_dim)
        .transpose(1, 2)
        for part in "qkv"
    )
    turn_keys = torch.cat((old[0], key), dim=2)
    turn_values = torch.cat((old[1], value), dim=2)
    moved = frames.key_moved.cos.shape[2] // _WORDS
    moved_keys, moved_values = (
        rows.unflatten(2, (-1, SLOTS))[:, :, :moved, PART["words"]].flatten(2, 3)
        for rows in (turn_keys, turn_values)
    )
    in_text = torch.cat((text[0], forward.rotate(moved_keys, *frames.key_moved)), dim=2)
    in_window = forward.rotate(turn_keys, *frames.key_window)
    keys = torch.cat(
        (functional.pad(in_window, (0, head_dim)), functional.pad(in_text, (head_dim, 0))), dim=2
    )
    values = torch.cat((turn_values, text[1], moved_values), dim=2)
    queries = torch.cat(
        (
            forward.rotate(query, *frames.query_window),
            forward.rotate(query, *frames.query_text),
        ),
        dim=-1,
    )
    group = sizes.num_attention_heads // sizes.num_key_value_heads
    attended = functional.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(group, dim=1),
        values.repeat_interleave(group, dim=1),
        attn_mask=frames.bias.expand(-1, sizes.num_attention_heads, -1, -1),
        scale=head_dim**-0.5,
    )
    attended = attended.transpose(1, 2).flatten(2)
    hidden = hidden + forward.linear(weights, "self_attn.o_proj", attended)
    normed = forward.norm(hidden, weights["post_attention_layernorm.weight"], sizes.rms_norm_eps)
    return hidden + forward.mlp(weights, "mlp", normed), key, value


def _frames(
    streamer: Streamer, prefix: Turn, state: State, ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Frames]:
    """Rows of the text before the window, their positions, and everything the layers share."""
    sizes, device, old = streamer.sizes, streamer.device, streamer.window.turns - 1
    count = ids.shape[1]
    turns = torch.cat((state.ids, ids), dim=1)
    valid = turns != EMPTY
    places, ends = turn_positions(turns)
    places = places.flatten(2)

    # Words that leave the window: turn j (counted from the oldest) is gone for new turn c > j.
    gone = count - 1
    words = valid[:, :gone, PART["words"]]
    opening = prefix.ids[:, :OPENING_SLOTS] != EMPTY
    text_start = opening.sum(1)
    moved_rank = words.flatten(1).long().cumsum(1)
    moved_positions = (text_start + state.text_count)[:, None] + moved_rank - 1
    lengths = words.sum(2).cumsum(1)
    text_length = state.text_count[:, None] + functional.pad(lengths, (1, 0))  # per new turn

    # Text rows: opening, previous text, the close once for every new turn, and padding.
    opening_rows, closing_rows = prefix.rows.split([OPENING_SLOTS, _CLOSING], dim=2)
    rows = torch.cat((opening_rows, state.text_rows, closing_rows.repeat(1, 1, count, 1)), dim=2)
    kept = rows.shape[2] + gone * _WORDS + valid[0].numel()
    padding = -kept % _ALIGNMENT
    rows = functional.pad(rows, (0, 0, 0, padding))
    close_start = text_start[:, None] + text_length
    close_places = close_start[..., None] + torch.arange(_CLOSING, device=device)
    positions = torch.cat(
        (
            text_places(opening),
            text_range(text_start, streamer.window.text),
            functional.pad(close_places.flatten(1), (0, padding))[:, None].expand(-1, 3, -1),
        ),
        dim=2,
    )

    # Queries in the text frame: the window begins right after the close.
    oldest_start = functional.pad(ends, (1, 0))[:, :count]
    oldest_start = oldest_start + valid[:, :count, PART["tail"]].sum(2)
    shift = close_start + _CLOSING - oldest_start
    new_places = places[:, :, old * SLOTS :]
    query_text = new_places + shift.repeat_interleave(SLOTS, dim=1)[:, None]

    return (
        rows,
        positions,
        Frames(
            _rotary(sizes, new_places, dtype),
            _rotary(sizes, query_text, dtype),
            _rotary(sizes, places, dtype),
            _rotary(sizes, moved_positions[:, None].expand(-1, 3, -1), dtype),
            attention_bias(_seen(streamer, state, opening, valid, words, count, padding), dtype)[
                :, None
            ],
        ),
    )


def _seen(
    streamer: Streamer,
    state: State,
    opening: torch.Tensor,
    valid: torch.Tensor,
    words: torch.Tensor,
    count: int,
    padding: int,
) -> torch.Tensor:
    """Which row each new token sees, bool `[B, k · SLOTS, rows]`, in the order of the keys."""
    device, old = streamer.device, streamer.window.turns - 1
    batch, total = valid.shape[:2]
    new = torch.arange(count, device=device)
    turn = torch.arange(total, device=device)
    before = (turn >= new[:, None]) & (turn < new[:, None] + old)
    visible = before[None, :, :, None] & valid[:, None]
    tail = torch.arange(SLOTS, device=device) < PART["tail"].stop
    visible &= ~((turn == new[:, None])[..., None] & tail)
    visible = visible[:, :, None].expand(-1, -1, SLOTS, -1, -1)
    own = (turn == new[:, None] + old)[:, None, :, None] & causal(SLOTS, device)[0][:, None]
    in_turns = visible | (own[None] & valid[:, None, None])

    text = torch.arange(streamer.window.text, device=device) < state.text_count[:, None]
    always = torch.cat((opening, text), dim=1)[:, None].expand(-1, count, -1)
    own_close = torch.eye(count, device=device, dtype=torch.bool).repeat_interleave(_CLOSING, 1)
    own_close = functional.pad(own_close, (0, padding))[None].expand(batch, -1, -1)
    is_gone = torch.arange(words.shape[1], device=device) < new[:, None]
    moved = (is_gone[None, :, :, None] & words[:, None]).flatten(2)
    in_text = torch.cat((always, own_close, moved), dim=2)
    in_text = in_text[:, :, None].expand(-1, -1, SLOTS, -1)
    return torch.cat((in_turns.flatten(3), in_text), dim=3).flatten(1, 2)


def _rotary(sizes: Sizes, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
    cos, sin = forward.rotary(sizes, positions, dtype)
    return Rotary(cos[:, None], sin[:, None])
