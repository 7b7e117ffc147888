"""Calibration statistics on disk: what was shown in JSON, the numbers in a safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import save_file

from framesink.calibration.observers import Histogram
from framesink.calibration.statistics import (
    CacheStatistics,
    ChannelRange,
    LinearStatistics,
    Statistics,
)
from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.safetensors import TensorInfo, read_header, read_tensor

STATISTICS_NAME = "calibration_statistics.json"
TENSORS_NAME = "calibration_statistics.safetensors"


class _Description(BaseModel):
    """`calibration_statistics.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    checkpoint: str
    source: str
    chunks: int
    linears: tuple[str, ...]
    layers: int


def save_statistics(statistics: Statistics, directory: Path) -> None:
    """Write the two files into `directory`."""
    tensors: dict[str, AnyArray] = {}
    for name, linear in statistics.linears.items():
        for field, values in _linear_fields(linear).items():
            tensors[f"linear.{name}.{field}"] = np.ascontiguousarray(values)
    for index, layer in enumerate(statistics.layers):
        for field, values in _cache_fields(layer).items():
            tensors[f"layer.{index}.{field}"] = np.ascontiguousarray(values)
    description = _Description(
        checkpoint=statistics.checkpoint,
        source=statistics.source,
        chunks=statistics.chunks,
        linears=tuple(statistics.linears),
        layers=len(statistics.layers),
    )
    save_file(tensors, directory / TENSORS_NAME)
    text = json.dumps(description.model_dump(), indent=2)
    (directory / STATISTICS_NAME).write_text(text + "\n")


def load_statistics(directory: Path) -> Statistics:
    """Read what `save_statistics` wrote. Raises CheckpointError if it is missing or malformed."""
    path = directory / STATISTICS_NAME
    try:
        description = _Description.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path} holds no calibration statistics; write them again with framesink calibrate."
        ) from error
    tensors = _Tensors(directory / TENSORS_NAME)
    return Statistics(
        checkpoint=description.checkpoint,
        source=description.source,
        chunks=description.chunks,
        linears={name: tensors.linear(f"linear.{name}") for name in description.linears},
        layers=tuple(tensors.cache(f"layer.{index}") for index in range(description.layers)),
    )


def _linear_fields(linear: LinearStatistics) -> Mapping[str, AnyArray]:
    histogram = linear.histogram
    return {
        "minimum": linear.channels.minimum,
        "maximum": linear.channels.maximum,
        "mean_square": linear.mean_square,
        "counts": histogram.counts,
        "limit": np.float64(histogram.limit).reshape(1),
        "rows": np.int64(linear.rows).reshape(1),
    }


def _cache_fields(layer: CacheStatistics) -> Mapping[str, AnyArray]:
    return {
        "minimum": layer.keys.minimum,
        "maximum": layer.keys.maximum,
        "key_pair_amax": layer.key_pair_amax,
        "rotated_key_amax": np.float64(layer.rotated_key_amax).reshape(1),
        "value_head_amax": layer.value_head_amax,
        "rows": np.int64(layer.rows).reshape(1),
    }


class _Tensors:
    """The safetensors file, read by name and shape."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: Mapping[str, TensorInfo] = read_header(path)

    def linear(self, prefix: str) -> LinearStatistics:
        channels = self._range(prefix)
        return LinearStatistics(
            channels=channels,
            mean_square=self._read(f"{prefix}.mean_square", np.float32),
            histogram=Histogram(
                counts=self._read(f"{prefix}.counts", np.int64),
                limit=float(self._read(f"{prefix}.limit", np.float64)[0]),
                amax=float(channels.amax.max()),
            ),
            rows=int(self._read(f"{prefix}.rows", np.int64)[0]),
        )

    def cache(self, prefix: str) -> CacheStatistics:
        return CacheStatistics(
            keys=self._range(prefix),
            key_pair_amax=self._read(f"{prefix}.key_pair_amax", np.float32),
            rotated_key_amax=float(self._read(f"{prefix}.rotated_key_amax", np.float64)[0]),
            value_head_amax=self._read(f"{prefix}.value_head_amax", np.float32),
            rows=int(self._read(f"{prefix}.rows", np.int64)[0]),
        )

    def _range(self, prefix: str) -> ChannelRange:
        return ChannelRange(
            minimum=self._read(f"{prefix}.minimum", np.float32),
            maximum=self._read(f"{prefix}.maximum", np.float32),
        )

    def _read(self, name: str, dtype: type[np.generic]) -> AnyArray:
        """A tensor `[n]`, n ≥ 1."""
        info = self._tensors.get(name)
        if info is None or info.dtype != np.dtype(dtype).name or len(info.shape) != 1:
            raise CheckpointError(
                f"{self._path} has no tensor {name} as calibration writes it; run framesink "
                "calibrate again."
            )
        return np.array(read_tensor(info))
