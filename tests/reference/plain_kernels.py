"""The kernels of the CUDA executor in plain torch, for any device: one line of mathematics each.

A module in the place of `framesink.runtime.executors.cuda.kernel_operations`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.linear import Weights
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import DeviceTiles


def append_rows(
    qkv: Tensor,
    rotary: RotaryTable,
    positions: Tensor,
    bases: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    new_keys: Tensor | None = None,
) -> None:
    """Keys rotated by their places, and values, into their slots."""
    key_heads, page_size, head_dim = k_pages.shape[1:]
    width = key_heads * head_dim
    keys = qkv[:, -2 * width : -width].unflatten(1, (key_heads, head_dim))
    values = qkv[:, -width:].unflatten(1, (key_heads, head_dim))
    if new_keys is not None:
        new_keys.copy_(_rotate(keys, positions, rotary))
    kept = slots >= 0
    pages, rows = slots[kept].long() // page_size, slots[kept].long() % page_size
    k_pages[pages, :, rows] = _rotate(keys, positions - bases, rotary)[kept]
    v_pages[pages, :, rows] = values[kept]


def paged_decode(
    qkv: Tensor,
    rotary: RotaryTable,
    positions: Tensor,
    tiles: DeviceTiles,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Every sequence by itself."""
    result = torch.zeros(out.shape)
    for index in range(len(qkv)):
        queries = _queries(qkv[index : index + 1], k_pages, out)
        scores, values = _context_scores(
            queries, positions[:, index : index + 1], rotary, tiles, index, k_pages, v_pages
        )
        result[index] = _mix(scores, values).flatten()
    quantize(result, out, output_format)


def paged_prefill(
    qkv: Tensor,
    new_keys: Tensor,
    rotary: RotaryTable,
    positions: Tensor,
    starts: Tensor,
    longest: int,
    tiles: DeviceTiles,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    output_format: OutputFormat,
) -> None:
    """Every sequence by itself, its context before its new tokens."""
    result = torch.zeros(out.shape)
    bounds = starts.tolist()
    for index in range(len(bounds) - 1):
        part = slice(bounds[index], bounds[index + 1])
        new = bounds[index + 1] - bounds[index]
        assert 0 < new <= longest
        queries = _queries(qkv[part], k_pages, out)
        older, older_values = _context_scores(
            queries, positions[:, part], rotary, tiles, index, k_pages, v_pages
        )
        keys = new_keys[part].float()
        newer = _scores(_rotate(queries, positions[:, part], rotary), keys)
        causal = torch.ones(new, new, dtype=torch.bool).tril()
        newer = newer.masked_fill(~causal, -torch.inf)
        width = keys.shape[1] * keys.shape[2]
        new_values = qkv[part, -width:].float().view(keys.shape)
        mixed = _mix(torch.cat([older, newer], dim=2), torch.cat([older_values, new_values]))
        result[part] = mixed.flatten(1)
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


def silu_and_multiply(gate_up: Tensor, out: Tensor, output_format: OutputFormat) -> None:
    """SwiGLU."""
    gate, up = gate_up.chunk(2, dim=1)
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


def linear(inputs: Tensor, weights: Weights, out: Tensor) -> None:
    """A linear layer, in float32."""
    product = inputs.float() @ weights.weight.float().T
    if weights.scale is not None:
        product = product * weights.scale
    if weights.bias is not None:
        product = product + weights.bias
    out.copy_(product)


def _rotate(heads: Tensor, places: Tensor, rotary: RotaryTable) -> Tensor:
    """`heads` `[n, H, D]` turned by `places` `[3, n]`, in float32."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(rotary.sections))
    pair = torch.arange(len(axis))
    angles = places[axis].T.long()
    cos, sin = (table[angles, pair][:, None] for table in (rotary.cos, rotary.sin))
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _queries(qkv: Tensor, k_pages: Tensor, out: Tensor) -> Tensor:
    head_dim = k_pages.shape[3]
    return qkv[:, : out.shape[1]].float().unflatten(1, (-1, head_dim))


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """`[H, s, m]` of rotated queries `[s, H, D]` and keys `[m, Hkv, D]`."""
    wide = keys.float().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    return torch.einsum("shd,mhd->hsm", queries, wide) * queries.shape[2] ** -0.5


def _context_scores(
    queries: Tensor,
    positions: Tensor,
    rotary: RotaryTable,
    tiles: DeviceTiles,
    sequence: int,
    k_pages: Tensor,
    v_pages: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scores `[H, s, m]` and values `[m, Hkv, D]` of a sequence's rows, tile after tile."""
    page_size = k_pages.shape[2]
    scores = [queries.new_empty(queries.shape[1], len(queries), 0)]
    values = [queries.new_empty(0, *v_pages.shape[1:2], v_pages.shape[3])]
    for tile in range(int(tiles.counts[sequence])):
        base = tiles.bases[sequence, tile]
        turned = _rotate(queries, positions - base, rotary)
        entries = zip(
            tiles.pages[sequence, tile].tolist(), tiles.masks[sequence, tile].tolist(), strict=True
        )
        for page, mask in entries:
            rows = [row for row in range(page_size) if mask >> row & 1]
            scores.append(_scores(turned, k_pages[page][:, rows].transpose(0, 1)))
            values.append(v_pages[page][:, rows].transpose(0, 1).float())
    return torch.cat(scores, dim=2), torch.cat(values)


def _mix(scores: Tensor, values: Tensor) -> Tensor:
    """`[s, H, D]` of scores `[H, s, m]` and values `[m, Hkv, D]`."""
    wide = values.repeat_interleave(len(scores) // values.shape[1], dim=1)
    return torch.einsum("hsm,mhd->shd", scores.softmax(dim=2), wide)
