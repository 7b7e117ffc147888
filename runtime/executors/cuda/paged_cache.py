"""The pages of all layers on the GPU."""

import torch

from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.models.config import TextConfig


class PagedCache:
    """Owns every layer's pages."""

    def __init__(
        self,
        config: TextConfig,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates zeroed pages of the compute type `dtype`."""
        shape = (num_pages, config.num_key_value_heads, page_size, config.head_dim)
        self.layers = tuple(
            LayerPages(
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers)
        )


def page_bytes(config: TextConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page's keys and values in all layers."""
    row = config.num_key_value_heads * config.head_dim * int(dtype.itemsize)
    return 2 * config.num_hidden_layers * page_size * row
