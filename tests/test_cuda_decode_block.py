"""What lies between two attentions of a decode step, in one launch, against float64."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from reference.triton_device import DEVICE, HAS_GPU
from torch import Tensor

from framesink.runtime.executors.cuda.kernels import decode_block
from framesink.runtime.executors.cuda.kernels.cuda_source import compile_source, why_no_compiler
from framesink.runtime.executors.cuda.kernels.decode_block import (
    Block,
    DecodeBlock,
    Shape,
    choose_shape,
)
from framesink.runtime.executors.cuda.kernels.formats import OutputFormat
from framesink.runtime.executors.cuda.kernels.linear import Weights
from framesink.runtime.executors.cuda.layers import Linear

HOPPER_SHARED_MEMORY = 227 * 1024
EPSILON = 1e-6
SOURCE = Path(decode_block.__file__).with_suffix(".cu")
NO_COMPILER = why_no_compiler()


@dataclass(frozen=True)
class Sizes:
    """Of a model: none but the first is divided evenly by a GPU's multiprocessors."""

    hidden: int
    attention: int
    inner: int
    qkv: int


QWEN_7B = Sizes(3584, 3584, 18944, 4608)
QWEN_3B = Sizes(2048, 2048, 11008, 2560)
ODD = Sizes(576, 768, 1472, 700)
TINY = Sizes(512, 512, 576, 100)


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(1, QWEN_7B), (8, QWEN_7B), (2, QWEN_3B), (3, ODD), (8, TINY)]
)
def test_shapes_fit(tokens: int, sizes: Sizes) -> None:
    shape = choose_shape(tokens, sizes.hidden, HOPPER_SHARED_MEMORY)
    assert shape is not None
    assert shape.shared_bytes <= HOPPER_SHARED_MEMORY
    # One thread finishes one output.
    assert tokens <= shape.warps
    more = replace(shape, slots=shape.slots + 1)
    assert shape.slots == 6 or more.shared_bytes > HOPPER_SHARED_MEMORY


def test_a_gpu_that_is_too_small_has_no_shape() -> None:
    assert choose_shape(8, 3584, 99 * 1024) is None
    assert choose_shape(9, 3584, HOPPER_SHARED_MEMORY) is None


def test_seven_billion_parameters_keep_much_on_its_way() -> None:
    # 14 warps read 256 of 3,584 inputs each.
    shape = choose_shape(1, 3584, HOPPER_SHARED_MEMORY)
    assert shape == Shape(1, 3584, 14, 3)


@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
@pytest.mark.parametrize(("sm", "fp8"), [("sm_90", 0), ("sm_90", 1), ("sm_100", 1)])
def test_the_kernel_compiles(sm: str, fp8: int) -> None:
    shape = Shape(2, 3584, 14, 3)
    definitions = {
        "TOKENS": shape.tokens,
        "WARPS": shape.warps,
        "SLOTS": shape.slots,
        "HIDDEN": shape.hidden,
        "SHARED_BYTES": shape.shared_bytes,
        "FP8": fp8,
        "BF16": 1,
    }
    assert b"decode_block" in compile_source(SOURCE, definitions, sm)
    # What the launch reserves is what the kernel lays out.
    with pytest.raises(RuntimeError, match="too little shared memory"):
        compile_source(SOURCE, definitions | {"SHARED_BYTES": shape.shared_bytes - 128}, sm)


class Model:
    """Random layers of codes, and what they make in float64."""

    def __init__(self, code_type: torch.dtype, value_type: torch.dtype, seed: int) -> None:
        self.code_type = code_type
        self.value_type = value_type
        self._generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=DEVICE)

    def codes(self, *shape: int) -> Tensor:
        if self.code_type is torch.int8:
            return (self.normal(*shape) * 40).round().clamp(-128, 127).to(torch.int8)
        return (self.normal(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)

    def linear(self, channels: int, depth: int, *, smooth: bool, biased: bool) -> Linear:
        """A layer whose inputs are about 1 large, and its outputs too."""
        largest = 127 if self.code_type is torch.int8 else 448
        input_scale = 5 / largest
        weight = self.codes(channels, depth)
        spread = 40 if self.code_type is torch.int8 else 100
        scale = (0.5 + self.normal(channels).abs()) * input_scale / (spread * depth**0.5)
        bias = self.normal(channels).to(self.value_type) if biased else None
        smoothing = 0.5 + self.normal(depth).abs() if smooth else None
        form = OutputFormat(self.code_type, input_scale, smoothing)
        return Linear(Weights(weight, scale, bias), form)

    def block(self, sizes: Sizes, *, smooth: bool, biased: bool, last: bool) -> Block:
        def linear(channels: int, depth: int) -> Linear:
            return self.linear(channels, depth, smooth=smooth, biased=biased)

        def norm() -> Tensor:
            return (1 + 0.1 * self.normal(sizes.hidden)).to(self.value_type)

        return Block(
            linear(sizes.hidden, sizes.attention),
            norm(),
            linear(2 * sizes.inner, sizes.hidden),
            linear(sizes.hidden, sizes.inner),
            None if last else norm(),
            None if last else linear(sizes.qkv, sizes.hidden),
        )

    def reference(
        self, block: Block, mixed: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Residual stream and q/k/v in float64, rounded where the kernels round."""
        hidden = hidden.double()
        hidden = self._rounded(hidden + self._product(mixed, block.output))
        inputs = self._encode(self._norm(hidden, block.mlp_norm), block.gate_up)
        gate, up = self._product(inputs, block.gate_up).chunk(2, dim=1)
        inner = self._rounded(self._rounded(gate * torch.sigmoid(gate)) * up)
        delta = self._product(self._encode(inner, block.down), block.down)
        hidden = self._rounded(hidden + delta)
        if block.next_norm is None or block.next_qkv is None:
            return hidden, None
        inputs = self._encode(self._norm(hidden, block.next_norm), block.next_qkv)
        return hidden, self._product(inputs, block.next_qkv)

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(self.value_type).double()

    def _product(self, inputs: Tensor, layer: Linear) -> Tensor:
        weights = layer.weights
        assert weights.scale is not None
        product = inputs.double() @ weights.weight.double().t() * weights.scale.double()
        return self._rounded(product if weights.bias is None else product + weights.bias.double())

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        inverse = (hidden.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()
        return self._rounded(self._rounded(hidden * inverse) * weight.double())

    def _encode(self, values: Tensor, reader: Linear) -> Tensor:
        form = reader.input
        if form.smoothing is not None:
            values = values * form.smoothing.double()
        values = values / form.scale
        if self.code_type is torch.int8:
            return values.clamp(-128, 127).round().to(torch.int8)
        return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="CUDA C++ runs on a GPU alone")
@pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))
@pytest.mark.parametrize("sizes", [QWEN_7B, QWEN_3B, ODD, TINY])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("code_type", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("value_type", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("plain", "last"), [(False, False), (True, True)])
def test_a_block_is_what_its_parts_are(
    sizes: Sizes,
    tokens: int,
    code_type: torch.dtype,
    value_type: torch.dtype,
    plain: bool,
    last: bool,
) -> None:
    if torch.cuda.get_device_capability() < decode_block.MIN_CAPABILITY:
        pytest.skip("the kernel needs Hopper's copy engine")
    device = torch.device(DEVICE)
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    shape = choose_shape(tokens, sizes.hidden, memory)
    if shape is None:
        pytest.skip("this GPU has too little shared memory")
    model = Model(code_type, value_type, seed=tokens)
    block = model.block(sizes, smooth=not plain, biased=not plain, last=last)
    mixed = model.codes(tokens, sizes.attention)
    hidden = model.normal(tokens, sizes.hidden).to(value_type)
    expected_hidden, expected_qkv = model.reference(block, mixed, hidden)
    kernel = DecodeBlock(shape, code_type, value_type, EPSILON, device)
    results = []
    for _ in range(2):
        updated = hidden.clone()
        qkv = None if last else torch.full((tokens, sizes.qkv), torch.nan, device=device)
        qkv = None if qkv is None else qkv.to(value_type)
        kernel.run(block, mixed, updated, qkv)
        results.append((updated, qkv))
    (updated, qkv), (again, qkv_again) = results
    assert torch.equal(updated, again)
    # What differs is a sum's last bits, and the few roundings that they turn.
    tolerance = 1e-3 if value_type is torch.float16 else 3e-3
    assert error(updated, expected_hidden) < tolerance
    if qkv is not None and qkv_again is not None and expected_qkv is not None:
        assert torch.equal(qkv, qkv_again)
        assert error(qkv, expected_qkv) < tolerance
