"""Where the GPU's weights come from: a bundle's safetensors files."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError, CheckpointError
from framesink.runtime.models.quantization import (
    QUANTIZATION_NAME,
    Quantization,
    TensorRule,
    read_quantization,
    tensor_rules,
)
from framesink.runtime.models.safetensors import TensorInfo, read_header

_STORAGE: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.int8),
    2: np.dtype(np.int16),
    4: np.dtype(np.int32),
}


class WeightSource(Protocol):
    """Tensors by canonical name, and what `quantization` says of them."""

    quantization: Quantization

    def get(self, name: str) -> Tensor:
        """A tensor in the type it is kept in, on the device."""
        ...

    def find(self, name: str) -> Tensor | None:
        """The same, or None where a tensor that may be left out is."""
        ...


class BundleWeights:
    """The weights of a bundle, each read when it is asked for."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        """Raises BundleError if a tensor is missing or does not fit the manifest's model."""
        manifest = bundle.manifest
        self._device = device
        self._tensors: dict[str, TensorInfo] = {}
        try:
            for file in manifest.weights:
                self._tensors |= read_header(bundle.path(file))
            described = QUANTIZATION_NAME in manifest.files
            found = read_quantization(bundle.directory) if described else None
            self.quantization = found or Quantization()
            required, optional = tensor_rules(manifest.model, self.quantization)
        except CheckpointError as error:
            raise BundleError(str(error)) from error
        for name, rule in required.items():
            if name not in self._tensors:
                raise BundleError(
                    f"The bundle {bundle.directory} has no weight {name}; build it again."
                )
            self._check(name, rule)
        for name in optional.keys() & self._tensors.keys():
            self._check(name, optional[name])

    def get(self, name: str) -> Tensor:
        """A tensor in the type of its file, on the device."""
        info = self._tensors[name]
        dtype: torch.dtype = getattr(torch, info.dtype)
        storage = _STORAGE[int(dtype.itemsize)]
        try:
            # Copy on write: torch has no read-only tensors.
            mapped = np.memmap(info.file, storage, mode="c", offset=info.offset, shape=info.shape)
        except (OSError, ValueError) as error:
            raise BundleError(f"Cannot read {name} from {info.file}: {error}.") from error
        # Numpy makes a map of shape () one of shape (1,).
        return torch.from_numpy(mapped).view(dtype).reshape(info.shape).to(self._device)

    def find(self, name: str) -> Tensor | None:
        """The same, or None where a tensor that may be left out is."""
        return self.get(name) if name in self._tensors else None

    def _check(self, name: str, rule: TensorRule) -> None:
        info = self._tensors[name]
        if info.shape not in rule.shapes or info.dtype not in rule.dtypes:
            raise BundleError(
                f"The weight {name} in {info.file} is {info.dtype} {list(info.shape)}, which does "
                "not fit the manifest's model; build the bundle again."
            )
