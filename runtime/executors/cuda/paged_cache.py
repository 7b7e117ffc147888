"""The pages of all layers on the GPU, and what their codes stand for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.cuda.kernels.pages import LayerPages, PageCodes
from framesink.runtime.executors.cuda.weight_source import WeightSource
from framesink.runtime.executors.cuda.weights import DecoderLayer
from framesink.runtime.models.config import TextConfig
from framesink.runtime.models.quantization import (
    CacheScheme,
    k_channel_scale,
    k_pair_scale,
    v_head_scale,
)

# Kernels count the numbers of one head in 32 bits.
_ADDRESSES = 1 << 31


class PagedCache:
    """Owns every layer's pages."""

    def __init__(
        self,
        config: TextConfig,
        source: WeightSource,
        layers: Sequence[DecoderLayer],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates zeroed pages: of codes if the model has a quantized cache, else of the compute
        type `dtype`.

        Codes are of keys without the bias of their projection: it is taken out of `layers`. Raises
        CapacityError for more pages than kernels can address.
        """
        if num_pages * page_size * config.head_dim >= _ADDRESSES:
            most = (_ADDRESSES - 1) // (page_size * config.head_dim)
            raise CapacityError(
                f"Kernels address up to {most} pages, not {num_pages}; ask for fewer."
            )
        scheme = source.quantization.cache
        heads, head_dim = config.num_key_value_heads, config.head_dim
        coded = scheme is not CacheScheme.UNQUANTIZED
        slots = num_pages * page_size
        places = torch.zeros(slots, dtype=torch.int64, device=device)
        shape = (heads, slots, head_dim // 2 if coded else head_dim)

        def pages() -> Tensor:
            return torch.zeros(shape, dtype=torch.int16 if coded else dtype, device=device)

        def codes(index: int) -> PageCodes:
            return PageCodes(
                scheme,
                _pair_scale(source, index, heads),
                source.get(v_head_scale(index)),
                _take_key_bias(layers[index], heads, head_dim),
                places,
            )

        self.layers = tuple(
            LayerPages(pages(), pages(), codes(index) if coded else None)
            for index in range(config.num_hidden_layers)
        )


def page_bytes(config: TextConfig, page_size: int, dtype: torch.dtype, scheme: CacheScheme) -> int:
    """Bytes of one page in all layers: keys, values and, beside codes, the rows' places."""
    coded = scheme is not CacheScheme.UNQUANTIZED
    row = config.num_key_value_heads * config.head_dim * (1 if coded else int(dtype.itemsize))
    places = torch.int64.itemsize if coded else 0
    return page_size * (2 * config.num_hidden_layers * row + places)


def _pair_scale(source: WeightSource, index: int, heads: int) -> Tensor:
    """Scales of a layer's rotary pairs, float32 `[Hkv, D/2]`: those that were calibrated, or such
    that no rotation of what the channels' scales hold is clipped."""
    found = source.find(k_pair_scale(index))
    if found is not None:
        return found.view(heads, -1)
    first, second = source.get(k_channel_scale(index)).view(heads, -1).chunk(2, dim=1)
    return torch.hypot(first, second)


def _take_key_bias(layer: DecoderLayer, heads: int, head_dim: int) -> Tensor:
    """The bias of a layer's keys, float32 `[Hkv, D]`, which its projection no longer adds."""
    bias = layer.qkv.weights.bias
    if bias is None:
        return torch.zeros(heads, head_dim, device=layer.input_norm.device)
    width = heads * head_dim
    part = bias[-2 * width : -width]
    taken = part.to(torch.float32, copy=True).view(heads, head_dim)
    part.zero_()
    return taken
