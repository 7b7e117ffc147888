"""A checkpoint's weights as torch tensors, each read when it is first needed."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.safetensors import TensorInfo
from framesink.runtime.models.weights import model_weights

# A model of at most this size in the compute type is converted once and kept.
KEPT_BYTES = 2_000_000_000
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class TorchWeights:
    """Weights in one float type on one device.

    On an accelerator every weight is moved once. On the CPU a large model stays a memory map, each
    weight converted when it is used and let go afterwards: no second copy of it is ever held.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Reads nothing yet."""
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        size = sum(math.prod(shape) for shape in model_weights(checkpoint.config).values())
        self._keep = device.type != "cpu" or size * dtype.itemsize <= KEPT_BYTES
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """The weight `name`, by its canonical name. It must not be changed."""
        if name in self._kept:
            return self._kept[name]
        weight = map_tensor(self._checkpoint.info(name)).to(self._device, self._dtype)
        if self._keep:
            self._kept[name] = weight
        return weight

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Some rows of a weight, `index` int64 `[n]`: only they are read and converted."""
        table = map_tensor(self._checkpoint.info(name))
        return table[index].to(self._device, self._dtype)

    def close(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()


def map_tensor(info: TensorInfo) -> Tensor:
    """A tensor of a float type over its file's memory map, in the type of the file.

    Nothing is read before it is touched; a change would stay in this process. Raises
    CheckpointError if the file is gone.
    """
    dtype = DTYPES[info.dtype]
    storage = np.dtype(np.int32) if dtype.itemsize == 4 else np.dtype(np.int16)
    try:
        # Copy on write: torch has no read-only tensors.
        mapped = np.memmap(info.file, storage, mode="c", offset=info.offset, shape=info.shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {info.name} from {info.file}: {error}.") from error
    return torch.from_numpy(mapped).view(dtype)
