"""Host integers on their way to the GPU: one pinned block, one copy a step."""

import torch
from torch import Tensor

from framesink.runtime.arrays import Int32Array
from framesink.runtime.errors import CapacityError

# Integers: 16 bytes.
_ALIGNMENT = 4


class Staging:
    """A block of int32 on the host and its copy on the device.

    Regions taken with `reserve` stay where they are for good, so that a CUDA graph may read them;
    those taken with `take` live until the next `clear`.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """`size` counts numbers."""
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._array: Int32Array = self._host.numpy()
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._sent = torch.cuda.Event() if on_gpu else None
        self._reserved = 0
        self._used = 0

    def reserve(self, count: int) -> tuple[Int32Array, Tensor]:
        """A region for good: what is written into the array is in the tensor after `send`."""
        region = self.take(count)
        self._reserved = self._used
        return region

    def take(self, count: int) -> tuple[Int32Array, Tensor]:
        """A region for one step. Raises CapacityError when the block is full."""
        start, end = self._used, self._used + count
        if end > self._array.size:
            raise CapacityError(
                f"A step needs more than the {self._array.size} integers its inputs were given; "
                "use fewer or smaller sequences in a step."
            )
        # Kernels are compiled by the alignment of what they are given: let it always be the same.
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return self._array[start:end], self._device[start:end]

    def put(self, values: Int32Array) -> Tensor:
        """Values for one step, of any shape; the tensor holds them after `send`."""
        array, tensor = self.take(values.size)
        array[:] = values.reshape(-1)
        return tensor.view(values.shape)

    def clear(self) -> None:
        """Begin another step, once the copy of the one before is done."""
        if self._sent is not None:
            self._sent.synchronize()
        self._used = self._reserved

    @property
    def used(self) -> int:
        """How many numbers have been taken."""
        return self._used

    def send(self, count: int | None = None) -> None:
        """Copy everything, or the first `count` numbers, to the device, in the current stream."""
        used = slice(0, self._used if count is None else count)
        self._device[used].copy_(self._host[used], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
