"""Writing safetensors block by block: the safetensors library reads what was written."""

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from framesink.runtime.models.safetensors import read_header, read_tensor
from framesink.runtime.models.safetensors_writer import SafetensorsWriter

TENSORS = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "eighth": np.array([448.0, -0.5, 0.0], dtype=ml_dtypes.float8_e4m3fn),
    "scale": np.array(0.25, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.int8),
    "packed": np.arange(5, dtype=np.uint8),
    "codes": np.arange(-4, 4, dtype=np.int8).reshape(4, 2),
}
LAYOUT = {name: (tensor.dtype.name, tensor.shape) for name, tensor in TENSORS.items()}


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, LAYOUT) as writer:
        for name, tensor in TENSORS.items():
            flat = tensor.reshape(-1)
            for start in range(0, max(1, flat.size), 2):
                writer.write(name, flat[start : start + 2])
    assert writer.size == path.stat().st_size
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read["eighth"].dtype == torch.float8_e4m3fn
    for name, tensor in TENSORS.items():
        assert tuple(read[name].shape) == tensor.shape
        assert np.array_equal(read[name].to(torch.float32).numpy(), tensor.astype(np.float32))
        assert np.array_equal(read_tensor(read_header(path)[name]), tensor)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("eighth", TENSORS["eighth"]),
        ("half", TENSORS["half"].astype(np.float32)),
        ("half", np.zeros(7, np.float16)),
        ("other", TENSORS["half"]),
    ],
)
def test_blocks_out_of_order_are_refused(tmp_path: Path, name: str, block: np.ndarray) -> None:
    with (
        pytest.raises(ValueError, match="does not come next"),
        SafetensorsWriter(tmp_path / "x.safetensors", LAYOUT) as writer,
    ):
        writer.write(name, block)


def test_a_file_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="lacks tensors"),
        SafetensorsWriter(tmp_path / "x.safetensors", LAYOUT) as writer,
    ):
        writer.write("half", TENSORS["half"])
