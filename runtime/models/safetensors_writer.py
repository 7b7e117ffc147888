"""Writing safetensors files block by block, so that a large tensor never lies in memory whole.

The safetensors library wants all tensors in memory at once.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import ml_dtypes
import numpy as np

from framesink.runtime.arrays import AnyArray
from framesink.runtime.models.safetensors import DTYPES

_ALIGNMENT = 64
_NAMES: Mapping[str, str] = {dtype.name: name for name, dtype in DTYPES.items()}

# A tensor's numpy dtype by name (`float16`, `bfloat16`, `float8_e4m3fn`, …) and its shape.
TensorLayout = tuple[str, tuple[int, ...]]


class SafetensorsWriter:
    """Writes the tensors of `layout`, in its order, each in one block or several.

    Used as a context manager. `sha256` (hex) and `size` (bytes) describe what was written so far.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout]) -> None:
        """Begin the file. Raises OSError if it cannot be written, here and in every `write`."""
        self._layout = layout
        self._names = iter(layout)
        self._name = ""
        self._missing = 0
        header = safetensors_header(layout)
        self._digest = hashlib.sha256()
        self.size = 0
        self._file: BinaryIO = path.open("wb")
        self._append(header)

    def write(self, name: str, block: AnyArray) -> None:
        """Append a block of the tensor `name`, C-contiguous, of the layout's dtype.

        Raises ValueError for a block that is not what the layout says comes next.
        """
        if self._missing == 0:
            self._name = next(self._names, "")
            self._missing = math.prod(self._layout[self._name][1]) if self._name else 0
        if (
            name != self._name
            or block.dtype.name != self._layout[name][0]
            or block.size > self._missing
        ):
            raise ValueError(f"{name} ({block.dtype.name}) does not come next in the layout.")
        self._missing -= block.size
        self._append(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what was written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None and (self._missing or next(self._names, None) is not None):
            raise ValueError(f"{self._file.name} lacks tensors of its layout.")

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


def safetensors_header(layout: Mapping[str, TensorLayout]) -> bytes:
    """The start of a safetensors file that holds the tensors of `layout`, in its order.

    Source: https://github.com/huggingface/safetensors#format.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * numpy_type(dtype).itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def numpy_type(name: str) -> np.dtype[np.generic]:
    """The numpy type of a dtype's name, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, name))
