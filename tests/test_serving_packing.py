"""Tensors that travel as bytes: what is packed comes back, and nothing else is believed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from framesink.runtime.arrays import AnyArray
from framesink.serving import contract
from framesink.serving.packing import NUMPY_TYPES, pack, unpack

PACKED = [
    tensor
    for tensor in {t.name: t for m in contract.MODELS for t in (*m.inputs, *m.outputs)}.values()
    if tensor.packed
]


@st.composite
def filled(draw: st.DrawFn) -> tuple[contract.Tensor, AnyArray]:
    tensor = draw(st.sampled_from(PACKED))
    shape = [size if isinstance(size, int) else draw(st.integers(0, 4)) for size in tensor.shape]
    dtype = NUMPY_TYPES[tensor.data_type]
    return tensor, draw(hnp.arrays(dtype, shape))


@given(filled())
def test_what_is_packed_comes_back(given: tuple[contract.Tensor, AnyArray]) -> None:
    tensor, values = given
    packed = pack(tensor, values)
    assert (packed.dtype, packed.ndim) == (np.uint8, 1)
    again = unpack(tensor, packed)
    assert again.dtype == values.dtype
    assert again.size == values.size
    if values.size:
        assert again.shape == values.shape
        assert again.tobytes() == values.tobytes()


def test_the_layout_is_dimensions_then_values_in_little_endian() -> None:
    """As a client of another language would write it."""
    packed = pack(contract.GRID, np.array([[1, 2, 515]], np.int32))
    expected = "0100000000000000 0300000000000000 01000000 02000000 03020000"
    assert packed.tobytes() == bytes.fromhex(expected)


@given(
    tensor=st.sampled_from(PACKED),
    dimensions=st.lists(
        st.sampled_from([0, 1, 2, 3, -1, -2, 1 << 31, 1 << 61, 1 << 62, -(1 << 63)]),
        min_size=1,
        max_size=4,
    ),
    content=st.binary(max_size=64),
)
def test_dimensions_that_lie_are_refused(
    tensor: contract.Tensor, dimensions: list[int], content: bytes
) -> None:
    """Products that overflow in 64 bits, and negative dimensions, among them."""
    head = b"".join(size.to_bytes(8, "little", signed=True) for size in dimensions)
    packed = np.frombuffer(head + content, np.uint8)
    try:
        values = unpack(tensor, packed)
    except ValueError as error:
        assert str(error).endswith(".")  # noqa: PT017
    else:
        assert values.nbytes <= packed.size
        assert all(
            isinstance(meant, str) or meant == size
            for meant, size in zip(tensor.shape, values.shape, strict=True)
        )


@pytest.mark.parametrize("wrong", [np.zeros(7, np.uint8), np.zeros((4, 8), np.uint8)])
def test_what_was_never_packed_is_refused(wrong: AnyArray) -> None:
    with pytest.raises(ValueError, match="not packed"):
        unpack(contract.GRID, wrong)
    with pytest.raises(ValueError, match="not packed"):
        unpack(contract.TIMESTAMPS, np.zeros(4))


def test_everything_with_a_free_dimension_travels_safely() -> None:
    """One free dimension of one-byte elements, or of strings, which the server counts."""
    for model in contract.MODELS:
        for tensor in (*model.inputs, *model.outputs):
            free = [size for size in tensor.wire_dims if size < 0]
            assert len(free) == 0 or (len(tensor.wire_dims) == 1 and tensor.wire_type in SAFE)


SAFE = ("UINT8", "BYTES")
