"""All of a decode step between two attentions in one launch, for 1 to 8 tokens.

The kernel is `decode_block.cu`, whose head says how it works; here it is sized, compiled and given
its arguments.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.cuda_source import Kernel, describe_matrix
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.linear import Weights

# The columns of the kernel's matrix instruction.
MOST_TOKENS = 8
# What the copy engine wants a row of weights to be a multiple of.
DEPTH_MULTIPLE = 16
# The first GPUs whose copy engine fills a ring by itself.
MIN_CAPABILITY = (9, 0)
_SOURCE = Path(__file__).with_suffix(".cu")
_LEAST_WARPS, _MOST_WARPS = MOST_TOKENS, 16
_LEAST_SLOTS, _MOST_SLOTS = 2, 6
# As in the kernel: channels of a tile and of a box, inputs of a step.
_TILE, _UNIT, _STEP = 16, 4, 256
_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel for `tokens` tokens of `hidden` channels is compiled: with `warps` a block, each
    with a ring of `slots` steps of weights."""

    tokens: int
    hidden: int
    warps: int
    slots: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: `Shared` in the kernel."""
        rings = self.warps * self.slots * _TILE * _STEP
        codes = self.tokens * (self.hidden + (64 if self.hidden % 128 == 0 else 0))
        sums = 2 * 2 * self.warps * _TILE * self.tokens * 4
        arrived = 8 * self.warps * self.slots
        squares = 4 * self.tokens * self.warps
        return -(-(rings + codes + sums + arrived + squares) // _ALIGNMENT) * _ALIGNMENT


def choose_shape(tokens: int, hidden: int, shared_memory: int) -> Shape | None:
    """The shape for a GPU whose blocks may have `shared_memory` bytes: warps that share `hidden`
    inputs most evenly, and as many slots as fit; None if too few do."""
    if not 1 <= tokens <= MOST_TOKENS:
        return None
    steps = -(-hidden // _STEP)
    warps = min(range(_LEAST_WARPS, _MOST_WARPS + 1), key=lambda count: (-(-steps // count), count))
    for slots in range(_MOST_SLOTS, _LEAST_SLOTS - 1, -1):
        shape = Shape(tokens, hidden, warps, slots)
        if shape.shared_bytes <= shared_memory:
            return shape
    return None


class Product(Protocol):
    """A linear layer and the form of its input (`layers.Linear`)."""

    @property
    def weights(self) -> Weights:
        """What it multiplies with."""
        ...

    @property
    def input(self) -> OutputFormat:
        """What it reads."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What a launch runs through: the attention's output projection, the norm before the MLP
    (`[hidden]`, of the compute type) and the MLP; and, but for the last layer, the norm and the
    q/k/v projection of the next layer."""

    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product
    next_norm: Tensor | None
    next_qkv: Product | None

    @property
    def products(self) -> list[Product]:
        """In the order in which they are run."""
        products = [self.output, self.gate_up, self.down]
        return products if self.next_qkv is None else [*products, self.next_qkv]


class DecodeBlock:
    """The kernel for batches of one size, of one model, on one GPU and stream."""

    def __init__(
        self,
        shape: Shape,
        code_type: torch.dtype,
        value_type: torch.dtype,
        epsilon: float,
        device: torch.device,
    ) -> None:
        """Compiles the kernel for codes of `code_type` and activations of `value_type`; `epsilon`
        is the norms'. Raises RuntimeError if it cannot be compiled."""
        self._shape = shape
        self._epsilon = epsilon
        self._blocks: int = torch.cuda.get_device_properties(device).multi_processor_count
        self._barrier = torch.zeros(1, dtype=torch.int32, device=device)
        definitions = {
            "TOKENS": shape.tokens,
            "WARPS": shape.warps,
            "SLOTS": shape.slots,
            "HIDDEN": shape.hidden,
            "SHARED_BYTES": shape.shared_bytes,
            "FP8": int(code_type is torch.float8_e4m3fn),
            "BF16": int(value_type is torch.bfloat16),
        }
        self._kernel = Kernel(_SOURCE, "decode_block", definitions, shape.shared_bytes, device)

    def run(self, block: Block, mixed: Tensor, hidden: Tensor, qkv: Tensor | None) -> None:
        """Everything between two attentions, for the shape's number of tokens.

        `mixed` `[tokens, H·D]`: codes of what the attention made. `hidden` `[tokens, hidden]` of
        the compute type: the residual stream, updated in place. `qkv` `[tokens, (H + 2·Hkv)·D]`:
        where the next layer's projections go, None for the last layer.
        """
        inner = torch.empty(
            (len(hidden), block.down.weights.weight.shape[1]),
            dtype=block.down.input.dtype,
            device=hidden.device,
        )
        next_norm, next_qkv = block.next_norm, block.next_qkv
        arguments = _Arguments(
            weights=(_Map * 4)(*[_map(product.weights.weight) for product in block.products]),
            products=(_Product * 4)(*[_product(product.weights) for product in block.products]),
            norms=(_Norm * 2)(
                _Norm(block.mlp_norm.data_ptr(), _encoding(block.gate_up.input)),
                _Norm()
                if next_norm is None or next_qkv is None
                else _Norm(next_norm.data_ptr(), _encoding(next_qkv.input)),
            ),
            gated=_encoding(block.down.input),
            mixed=mixed.data_ptr(),
            hidden=hidden.data_ptr(),
            inner=inner.data_ptr(),
            qkv=None if qkv is None else qkv.data_ptr(),
            barrier=self._barrier.data_ptr(),
            epsilon=self._epsilon,
            count=len(block.products),
        )
        self._kernel.launch(self._blocks, 32 * self._shape.warps, arguments)


# A description of a matrix for the copy engine (CUtensorMap).
_Map = ctypes.c_uint64 * 16


class _Product(ctypes.Structure):
    """`Linear` in the kernel."""

    _fields_: ClassVar = [
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("channels", ctypes.c_int),
        ("depth", ctypes.c_int),
    ]


class _Encoding(ctypes.Structure):
    """`Encoding` in the kernel."""

    _fields_: ClassVar = [("smoothing", ctypes.c_void_p), ("scale", ctypes.c_float)]


class _Norm(ctypes.Structure):
    """`Norm` in the kernel."""

    _fields_: ClassVar = [("weight", ctypes.c_void_p), ("encoding", _Encoding)]


class _Arguments(ctypes.Structure):
    """`Params` in the kernel."""

    _fields_: ClassVar = [
        ("weights", _Map * 4),
        ("products", _Product * 4),
        ("norms", _Norm * 2),
        ("gated", _Encoding),
        ("mixed", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("inner", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("barrier", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
        ("count", ctypes.c_int),
        # The kernel's structure is aligned to a map, of 64 bytes.
        ("padding", ctypes.c_ubyte * 64),
    ]


def _product(weights: Weights) -> _Product:
    assert weights.scale is not None
    bias = None if weights.bias is None else weights.bias.data_ptr()
    channels, depth = weights.weight.shape
    return _Product(weights.scale.data_ptr(), bias, channels, depth)


def _encoding(form: OutputFormat) -> _Encoding:
    smoothing = None if form.smoothing is None else form.smoothing.data_ptr()
    return _Encoding(smoothing, form.scale)


def _map(weight: Tensor) -> "ctypes.Array[ctypes.c_uint64]":
    channels, depth = weight.shape
    return _Map(*describe_matrix(weight.data_ptr(), channels, depth, (_UNIT, _STEP)))
