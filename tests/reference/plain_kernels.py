"""The kernels of the CUDA executor in plain torch, for any device: one line of mathematics each.

A module in the place of `framesink.runtime.executors.cuda.kernel_operations`.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from framesink.runtime.executors.base import NEXT_TOKEN
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.frames import DeviceFilter
from framesink.runtime.executors.cuda.kernels.linear import Weights
from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.step_tokens import NOT_FINITE, Choosing, TileChanges
from framesink.runtime.executors.cuda.kernels.tiles import NO_SLOT, DeviceRows, DeviceTiles, NewRows
from framesink.runtime.preprocess import Grid, PreprocessConfig
from reference.unpacked_rows import read_places, read_rows, write_rows


def begin_step(
    tokens: Tensor,
    last_tokens: Tensor,
    embedding: Tensor,
    tiles: DeviceTiles,
    changes: TileChanges,
    hidden: Tensor,
) -> None:
    """Patch the tables, and look the embeddings up."""
    rows = tiles.rows.long()
    tiles.bases[rows, changes.tiles.long()] = changes.bases
    tiles.slots[rows, changes.tiles.long()] = changes.slots.T
    tiles.counts[rows] = changes.counts
    chosen = last_tokens[rows].clamp(min=0)
    hidden.copy_(embedding[torch.where(tokens == NEXT_TOKEN, chosen, tokens)])


def choose_likeliest(logits: Tensor, rows: Tensor, choosing: Choosing, tokens: Tensor) -> None:
    """The first of the largest."""
    permitted = logits.float().masked_fill(choosing.allowed == 0, -torch.inf)
    best = permitted.amax(dim=1)
    first = (permitted == best[:, None]).to(torch.int32).argmax(dim=1)
    tokens.copy_(torch.where(best.isfinite(), first, NOT_FINITE))
    choosing.last_tokens[rows.long()] = tokens


def rotate_and_append(
    qkv: Tensor,
    rotary: RotaryTable,
    rows: NewRows,
    pages: LayerPages,
) -> None:
    """Keys rotated by their places, and values, into their slots; all rotated by their positions in
    place."""
    key_heads = pages.key_heads
    heads = qkv.view(len(qkv), -1, pages.head_dim)
    keys, values = heads[:, -2 * key_heads : -key_heads], heads[:, -key_heads:]
    positions, slots = rows.positions, rows.slots
    kept = slots >= 0
    places = positions - rows.bases
    turned = _rotate(keys, places, rotary)
    write_rows(pages, slots[kept], turned[kept], values[kept], places[:, kept])
    if pages.codes is not None:
        # New tokens see each other as all later ones will see them.
        coded, coded_values = read_rows(pages, slots[kept])
        keys[kept] = _rotate(coded, places[:, kept], rotary, back=True).to(keys.dtype)
        values[kept] = coded_values.to(values.dtype)
        keys += pages.codes.key_bias
    turned = heads[:, :-key_heads]
    turned.copy_(_rotate(turned, positions, rotary))


def paged_decode(
    qkv: Tensor,
    rotary: RotaryTable,
    rows: NewRows,
    tiles: DeviceTiles,
    pages: LayerPages,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Every sequence by itself, once all rows are written."""
    qkv = qkv.clone()
    rotate_and_append(qkv, rotary, rows, pages)
    result = torch.zeros(out.shape)
    for index in range(len(qkv)):
        queries = _queries(qkv[index : index + 1], pages, out)
        scores, values = _context_scores(queries, rotary, tiles, index, pages)
        result[index] = _mix(scores, values).flatten()
    quantize(result, out, output_format)


def paged_prefill(
    qkv: Tensor,
    rotary: RotaryTable,
    starts: Tensor,
    longest: int,
    rows: DeviceRows,
    pages: LayerPages,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Every sequence by itself, its context before its new tokens, keys at their positions."""
    result = torch.zeros(out.shape)
    key_heads, head_dim = pages.key_heads, pages.head_dim
    bounds = starts.tolist()
    for index in range(len(bounds) - 1):
        part = slice(bounds[index], bounds[index + 1])
        new, old = bounds[index + 1] - bounds[index], int(rows.counts[index])
        assert new <= longest
        if new == 0:
            continue
        assert old <= rows.slots.shape[1]
        slots, bases = rows.slots[index, :old], rows.bases[index, :old]
        older, older_values = read_rows(pages, slots)
        turned = torch.empty(older.shape)
        for sign in (-1, 1):
            chosen = bases * sign >= 0
            angles = bases[chosen].abs().expand(3, -1)
            turned[chosen] = _rotate(older[chosen], angles, rotary, back=sign < 0)
        turned += _turned_bias(pages, slots, bases, rotary)
        heads = qkv[part].float().view(new, -1, head_dim)
        keys = torch.cat([turned, heads[:, -2 * key_heads : -key_heads]])
        scores = _scores(heads[:, : -2 * key_heads], keys)
        hidden = torch.ones(new, old + new, dtype=torch.bool).triu(old + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        values = torch.cat([older_values, heads[:, -key_heads:]])
        result[part] = _mix(scores, values).flatten(1)
    quantize(result, out, output_format)


def rms_norm(
    hidden: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Tensor,
    output_format: OutputFormat,
    delta: Tensor | None = None,
) -> None:
    """Norm over the last axis, after the residual."""
    if delta is not None:
        hidden += delta
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    quantize(weight * normed.to(hidden.dtype), out, output_format)


def gated_linear(
    inputs: Tensor,
    weights: Weights,
    out: Tensor,
    output_format: OutputFormat,
    dtype: torch.dtype,
) -> None:
    """SwiGLU of a linear layer."""
    projected = torch.empty((len(inputs), len(weights.weight)), dtype=dtype, device=out.device)
    linear(inputs, weights, projected)
    gate, up = projected.chunk(2, dim=1)
    quantize(functional.silu(gate) * up, out, output_format)


def quantize(values: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """Values as codes, or as they are."""
    wide = values.float()
    if output_format.smoothing is not None:
        wide = wide * output_format.smoothing
    if out.dtype is torch.float8_e4m3fn:
        wide = (wide / output_format.scale).clamp(-448.0, 448.0)
    elif out.dtype is torch.int8:
        wide = (wide / output_format.scale).round().clamp(-128.0, 127.0)
    out.copy_(wide)


def rotate_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Rotate queries and keys of the vision encoder in place."""
    rows = qkv.view(len(qkv), 3, heads, -1)[:, :2]
    first, second = rows.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    rows.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))


def window_attention(
    qkv: Tensor,
    starts: Tensor,
    longest: int,
    heads: int,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Every window of the vision encoder by itself."""
    query, key, value = qkv.view(len(qkv), 3, heads, -1).transpose(0, 2).unbind(1)
    mixed = torch.empty(query.shape, dtype=qkv.dtype)
    for start, end in pairwise(starts.tolist()):
        assert 0 < end - start <= longest
        window = slice(start, end)
        mixed[:, window] = functional.scaled_dot_product_attention(
            query[:, window], key[:, window], value[:, window]
        )
    quantize(mixed.transpose(0, 1).flatten(1), out, output_format)


def frames_to_patches(
    frames: Tensor,
    resampling: DeviceFilter,
    levels: Tensor,
    grid: Grid,
    config: PreprocessConfig,
    out: Tensor,
) -> None:
    """Whole frames: one side resized, then the other."""
    temporal, patch, merge = config.temporal_patch_size, config.patch_size, config.merge_size
    missing = grid.t * temporal - frames.shape[1]
    whole = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1).float()
    columns = whole[:, :, :, resampling.column_index.long()]
    lines = (columns * resampling.column_weight[..., None]).sum(4)[
        :, :, resampling.row_index.long()
    ]
    weight = resampling.row_weight[:, :, None, None]
    if resampling.fixed_point:
        rows = (lines.long() >> 4) * weight.long() >> 16
        resized = (rows.sum(3) + 2) >> 2
    else:
        resized = ((lines * weight).sum(3) + resampling.tie).round()
    planes = resized.long().clamp(0, 255).permute(4, 0, 1, 2, 3)
    values = torch.stack([levels[channel][planes[channel]] for channel in range(3)], dim=-1)
    down, across = grid.h // merge, grid.w // merge
    blocks = values.view(-1, temporal, down, merge, patch, across, merge, patch, 3)
    out.copy_(blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(out.shape))


def linear(inputs: Tensor, weights: Weights, out: Tensor) -> None:
    """A linear layer, in float32."""
    product = inputs.float() @ weights.weight.float().T
    if weights.scale is not None:
        product = product * weights.scale
    if weights.bias is not None:
        product = product + weights.bias
    out.copy_(product)


def _rotate(heads: Tensor, places: Tensor, rotary: RotaryTable, *, back: bool = False) -> Tensor:
    """`heads` `[n, H, D]` turned by `places` `[3, n]`, or turned back, in float32."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(rotary.sections))
    pair = torch.arange(len(axis))
    angles = places[axis].T.long()
    cos, sin = (table[angles, pair][:, None] for table in (rotary.cos, rotary.sin))
    sin = -sin if back else sin
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _queries(qkv: Tensor, pages: LayerPages, out: Tensor) -> Tensor:
    return qkv[:, : out.shape[1]].float().unflatten(1, (-1, pages.head_dim))


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """`[H, s, m]` of rotated queries `[s, H, D]` and keys `[m, Hkv, D]`."""
    wide = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return torch.einsum("shd,mhd->hsm", queries, wide) * queries.shape[2] ** -0.5


def _context_scores(
    queries: Tensor,
    rotary: RotaryTable,
    tiles: DeviceTiles,
    sequence: int,
    pages: LayerPages,
) -> tuple[Tensor, Tensor]:
    """Scores `[H, s, m]` and values `[m, Hkv, D]` of a sequence's rows, tile after tile."""
    scores = [queries.new_empty(queries.shape[1], len(queries), 0)]
    values = [queries.new_empty(0, pages.key_heads, pages.head_dim)]
    context = int(tiles.rows[sequence])
    for tile in range(int(tiles.counts[context])):
        base = int(tiles.bases[context, tile])
        turned = _rotate(queries, torch.full((3, len(queries)), abs(base)), rotary, back=base > 0)
        slots = tiles.slots[context, tile]
        slots = slots[slots != NO_SLOT]
        keys, tile_values = read_rows(pages, slots)
        bias = _turned_bias(pages, slots, torch.full(slots.shape, base), rotary)
        scores.append(_scores(turned, keys) + _scores(queries, bias))
        values.append(tile_values)
    return torch.cat(scores, dim=2), torch.cat(values)


def _turned_bias(pages: LayerPages, slots: Tensor, bases: Tensor, rotary: RotaryTable) -> Tensor:
    """What keys in `slots` lack, at their positions: `[n, Hkv, D]`, 0 if they have their bias."""
    if pages.codes is None:
        return torch.zeros(len(slots), pages.key_heads, pages.head_dim)
    bias = pages.codes.key_bias.expand(len(slots), -1, -1)
    return _rotate(bias, read_places(pages, slots) + bases, rotary)


def _mix(scores: Tensor, values: Tensor) -> Tensor:
    """`[s, H, D]` of scores `[H, s, m]` and values `[m, Hkv, D]`."""
    wide = values.repeat_interleave(len(scores) // values.shape[1], dim=1)
    return torch.einsum("hsm,mhd->shd", scores.softmax(dim=2), wide)
