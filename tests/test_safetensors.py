"""The safetensors reader: lazy, and never fooled by a header."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.safetensors import DTYPES, read_header, read_tensor


def test_reading_maps_the_file_instead_of_loading_it(tmp_path: Path) -> None:
    """A tensor of 64 GB in a sparse file opens and gives one element."""
    header = {"x": {"dtype": "F32", "shape": [1 << 34], "data_offsets": [0, 1 << 36]}}
    path = tmp_path / "sparse.safetensors"
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        try:
            file.truncate(8 + len(encoded) + (1 << 36))
        except OSError:
            pytest.skip("this file system has no sparse files of that size")
    array = read_tensor(read_header(path)["x"])
    assert array.shape == (1 << 34,)
    assert array[-1] == 0.0
    assert not array.flags.writeable


def write_header(path: Path, header: object, data: bytes = b"\0" * 64) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 15]}, "byte range of 15"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}, "byte range of -16"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "malformed"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "malformed"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "malformed"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}, "malformed"),
        ({"dtype": "F32", "shape": [1] * 20, "data_offsets": [0, 4]}, "malformed"),
        ({"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]}, "unknown dtype"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}, "truncated"),
        ({"dtype": "U8", "shape": [1 << 62], "data_offsets": [0, 1 << 62]}, "truncated"),
        ({"shape": [4]}, "unknown dtype"),
        ([], "malformed"),
        (None, "malformed"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, entry: object, words: str) -> None:
    path = tmp_path / "x.safetensors"
    write_header(path, {"x": entry})
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_header(path)


def test_overlapping_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    first = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_header(path, {"a": first, "b": {**first, "data_offsets": [12, 28]}})
    with pytest.raises(CheckpointError, match="overlaps"):
        read_header(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="header length"):
        read_header(path)


def small_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "c": {"dtype": "F16", "shape": [0, 5], "data_offsets": [22, 22]},
    }
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(range(22))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(small_file()) - 1), st.binary(max_size=3)), max_size=4
    ),
    kept=st.integers(0, len(small_file())),
)
def test_mutated_files_are_read_or_refused(
    tmp_path: Path, edits: list[tuple[int, bytes]], kept: int
) -> None:
    """Whatever the bytes: CheckpointError, or tensors that lie inside the file and can be read."""
    data = bytearray(small_file())
    for place, replacement in edits:
        data[place : place + len(replacement)] = replacement
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(bytes(data[: len(data) if kept % 2 else kept]))
    check_whatever_is_read(path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPES, "F4"]),
                "shape": st.lists(st.integers(-1, 9) | st.integers(), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 70), max_size=3),
            }
        ),
        max_size=4,
    )
)
def test_invented_headers_are_read_or_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    path = tmp_path / "invented.safetensors"
    write_header(path, header)
    check_whatever_is_read(path)


def check_whatever_is_read(path: Path) -> None:
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    for info in tensors.values():
        assert 8 <= info.offset <= info.offset + info.nbytes <= size
        assert read_tensor(info).nbytes == info.nbytes
