"""Decode steps of few tokens in fewer launches: which batch sizes have them, and their layers."""

import logging
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from framesink.runtime.executors.cuda.kernels.cuda_source import why_no_compiler
from framesink.runtime.executors.cuda.kernels.decode_block import (
    DEPTH_MULTIPLE,
    MIN_CAPABILITY,
    Block,
    DecodeBlock,
    Shape,
    choose_shape,
)
from framesink.runtime.executors.cuda.weights import DecoderLayer, LanguageModelWeights

_log = logging.getLogger(__name__)


class DecodeBlocks:
    """What lies between the attentions of a decode step, for the batch sizes that run it in one
    launch a layer."""

    def __init__(self, layers: tuple[Block, ...], kernels: dict[int, DecodeBlock]) -> None:
        """`layers` one after another; `kernels` by the number of tokens."""
        self._layers = layers
        self._kernels = kernels

    @classmethod
    def find(
        cls,
        weights: LanguageModelWeights,
        epsilon: float,
        batch_sizes: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Those that the model and the GPU allow, compiled; `dtype` is the compute type.

        Without any, decode steps take more launches; why is logged.
        """
        layers = tuple(_blocks(weights.layers))
        reason = _why_not(layers, dtype, device)
        kernels: dict[int, DecodeBlock] = {}
        if reason is None:
            for tokens in batch_sizes:
                shape = _shape(layers[0], tokens, device)
                if shape is not None:
                    code_type = layers[0].output.input.dtype
                    kernels[tokens] = DecodeBlock(shape, code_type, dtype, epsilon, device)
        else:
            _log.info("decode steps run one kernel after another: %s", reason)
        return cls(layers, kernels)

    def __contains__(self, tokens: int) -> bool:
        """Whether batches of `tokens` are run in one launch a layer."""
        return tokens in self._kernels

    def run(self, index: int, mixed: Tensor, hidden: Tensor, qkv: Tensor) -> None:
        """From the attention of layer `index` to the next one's q/k/v: see `DecodeBlock.run`."""
        block = self._layers[index]
        kernel = self._kernels[len(hidden)]
        kernel.run(block, mixed, hidden, None if block.next_qkv is None else qkv)


def _blocks(layers: tuple[DecoderLayer, ...]) -> Iterable[Block]:
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        yield Block(
            layer.output,
            layer.post_attention_norm,
            layer.gate_up,
            layer.down,
            None if after is None else after.input_norm,
            None if after is None else after.qkv,
        )


def _why_not(layers: tuple[Block, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    """What stands against it, as a clause; None if nothing does."""
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "the GPU is older than sm90"
    code_types = {product.input.dtype for block in layers for product in block.products}
    if code_types not in ({torch.float8_e4m3fn}, {torch.int8}):
        return "not all linear layers have FP8 codes, or all INT8 codes"
    if any(
        product.weights.weight.shape[1] % DEPTH_MULTIPLE
        for block in layers
        for product in block.products
    ):
        return f"a linear layer's inputs are no multiple of {DEPTH_MULTIPLE}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel does not calculate in {dtype}"
    return why_no_compiler()


def _shape(block: Block, tokens: int, device: torch.device) -> Shape | None:
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return choose_shape(tokens, len(block.down.weights.weight), memory)
