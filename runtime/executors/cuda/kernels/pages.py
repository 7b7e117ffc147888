"""The pages of one layer, as kernels take them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerPages:
    """Keys and values of one layer, `[N, Hkv, page, D]` each, in the compute type.

    Keys are turned by their places, with the bias of their projection.
    """

    keys: Tensor
    values: Tensor

    @property
    def key_heads(self) -> int:
        """How many heads keys and values have."""
        return int(self.keys.shape[1])

    @property
    def page_size(self) -> int:
        """Rows of a page."""
        return int(self.keys.shape[2])

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return int(self.keys.shape[3])
