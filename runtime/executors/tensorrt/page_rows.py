"""New K/V rows, written into the pages they belong to."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.executors.batching import PaddedGroup


def row_places(group: PaddedGroup, page_size: int) -> Tensor:
    """Int64 `[4, T]` of a group's new rows: page and row they go to, sequence and token they are
    of."""
    places = np.stack([*np.divmod(group.slots, page_size), *group.rows])
    return torch.from_numpy(places.astype(np.int64))


def write_rows(pools: Mapping[str, Tensor], outputs: Mapping[str, Tensor], places: Tensor) -> None:
    """Copy rows of `k_new.i` and `v_new.i` `[B, Hkv, s, D]` into `k_pages.i` and `v_pages.i`
    `[N, Hkv, page, D]` of the same type. Can be captured in a graph."""
    page, row, sequence, token = places
    for name, pool in pools.items():
        pool[page, :, row] = outputs[name.replace("_pages.", "_new.")][sequence, :, token]
