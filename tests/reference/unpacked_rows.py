"""Rows of the CUDA executor's pages in plain torch, as values or as codes."""

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.pages import PLACE_BITS, LayerPages
from framesink.runtime.models.quantization import CacheScheme


def write_rows(
    pages: LayerPages, slots: Tensor, keys: Tensor, values: Tensor, places: Tensor
) -> None:
    """Put `keys` (turned by their places, without bias where pages hold codes) and `values`
    `[n, Hkv, D]` of `places` `[3, n]` into `slots`, n distinct ones."""
    slots = slots.long()
    if pages.codes is None:
        pages.keys[:, slots] = keys.to(pages.keys.dtype).transpose(0, 1)
        pages.values[:, slots] = values.to(pages.values.dtype).transpose(0, 1)
        return
    key_scale, value_scale = _scales(pages)
    scheme = pages.codes.scheme
    pages.keys[:, slots] = _words(keys.float() / key_scale, scheme).transpose(0, 1)
    pages.values[:, slots] = _words(values.float() / value_scale, scheme).transpose(0, 1)
    t, h, w = places.long()
    pages.codes.places[slots] = t | h << int(PLACE_BITS) | w << 2 * int(PLACE_BITS)


def read_rows(pages: LayerPages, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (as `write_rows` takes them) and values, float32 `[n, Hkv, D]`."""
    keys, values = (held[:, slots.long()].transpose(0, 1) for held in (pages.keys, pages.values))
    if pages.codes is None:
        return keys.float(), values.float()
    key_scale, value_scale = _scales(pages)
    scheme = pages.codes.scheme
    return _numbers(keys, scheme) * key_scale, _numbers(values, scheme) * value_scale


def read_places(pages: LayerPages, slots: Tensor) -> Tensor:
    """Places int64 `[3, n]` of rows in pages of codes."""
    assert pages.codes is not None
    packed = pages.codes.places[slots.long()]
    mask = (1 << int(PLACE_BITS)) - 1
    return torch.stack([packed >> axis * int(PLACE_BITS) & mask for axis in range(3)])


def _scales(pages: LayerPages) -> tuple[Tensor, Tensor]:
    assert pages.codes is not None
    return pages.codes.key_scale.repeat(1, 2), pages.codes.value_scale[:, None]


def _words(values: Tensor, scheme: CacheScheme) -> Tensor:
    if scheme is CacheScheme.FP8:
        codes = values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = (values.round().clamp(-128.0, 127.0) + 128.0).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2).view(torch.int16)


def _numbers(words: Tensor, scheme: CacheScheme) -> Tensor:
    codes = words.contiguous().view(torch.uint8)
    numbers = (
        codes.view(torch.float8_e4m3fn).float()
        if scheme is CacheScheme.FP8
        else codes.float() - 128.0
    )
    return torch.cat([numbers[..., ::2], numbers[..., 1::2]], dim=-1)
