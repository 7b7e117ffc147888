"""An engine over random weights of a published size, made on the GPU: nothing to download."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from framesink.bench.precisions import Precision, Precisions
from framesink.build.random_checkpoint import SIZES, random_tensors, write_random_description
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import OptionError
from framesink.runtime.executors.cuda import kernel_operations
from framesink.runtime.executors.cuda.executor import CudaExecutor
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
    quantizable_linears,
)
from framesink.runtime.models.weights import output_projection
from framesink.runtime.preprocess import PreprocessConfig, frame_grid, resize_frames
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

PAGE_SIZE = 16
MAX_CONTEXT = 16_384
MAX_PREFILL = 1024
DTYPE = torch.bfloat16
# Frames may be smaller than the published minimum: a chunk of a few tokens measures the rest.
MIN_PIXELS = 56 * 56
_SCHEMES: dict[Precision, LinearScheme] = {
    "bf16": LinearScheme.UNQUANTIZED,
    "fp8": LinearScheme.FP8,
    "int8": LinearScheme.INT8,
}
_CACHE_SCHEMES: dict[Precision, CacheScheme] = {
    "bf16": CacheScheme.UNQUANTIZED,
    "fp8": CacheScheme.FP8,
    "int8": CacheScheme.INT8,
}


class RandomWeights:
    """Weights drawn when they are asked for, as `framesink.build.random_checkpoint` draws them. See
    `framesink.runtime.executors.cuda.weight_source.WeightSource`."""

    def __init__(
        self, config: ModelConfig, quantization: Quantization, device: torch.device, seed: int = 0
    ) -> None:
        self.quantization = quantization
        self._tensors = random_tensors(config, quantization)
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def get(self, name: str) -> Tensor:
        """A tensor of its own every time."""
        tensor = self._tensors[name]
        values = torch.empty(tensor.shape, dtype=torch.float32, device=self._device)
        values.normal_(tensor.mean, tensor.deviation, generator=self._generator)
        if tensor.largest is not None:
            values.clamp_(-tensor.largest, tensor.largest)
        return values.to(getattr(torch, tensor.dtype))

    def find(self, name: str) -> Tensor | None:
        """The same, or None for what such a checkpoint does not have."""
        return self.get(name) if name in self._tensors else None


def quantization_of(config: ModelConfig, precisions: Precisions) -> Quantization:
    """How such a checkpoint is quantized."""
    linears = {}
    for name in quantizable_linears(config):
        if name.startswith("model.layers."):
            linears[name] = _SCHEMES[precisions.blocks]
        elif name.startswith("visual.blocks."):
            linears[name] = _SCHEMES[precisions.vision]
        elif f"{name}.weight" == output_projection(config.text):
            linears[name] = _SCHEMES[precisions.head]
    return Quantization(linears, cache=_CACHE_SCHEMES[precisions.cache])


def open_random_engine(
    size: str, precisions: Precisions, *, sessions: int, frame_size: tuple[int, int]
) -> StreamingEngine:
    """An engine on the first GPU with room for `sessions` sessions of `MAX_CONTEXT` tokens.

    `size` is one of `framesink.build.random_checkpoint.SIZES`. Chunks are two frames of at most
    `frame_size` (height, width). Raises OptionError for a size that is unknown, a head in one byte
    where it is the embedding's table, or a machine without a GPU; CapacityError if weights and
    pages do not fit into the GPU's memory.
    """
    if size not in SIZES:
        raise OptionError(f"There is no size {size!r}; there are {', '.join(SIZES)}.")
    if SIZES[size]["tie_word_embeddings"] and precisions.head != "bf16":
        raise OptionError(
            f"The head of {size} is the embedding's table, which stays in 16 bits; leave out "
            "--head-precision."
        )
    if not torch.cuda.is_available():
        raise OptionError("Random weights are made on a GPU, and torch sees none here.")
    preprocess = PreprocessConfig(min_pixels=MIN_PIXELS)
    frames = resize_frames(np.zeros((2, *frame_size, 3), np.uint8), preprocess)
    max_patches = frame_grid(frames, preprocess).patches
    with TemporaryDirectory() as directory:
        config = write_random_description(size, Path(directory))
        protocol = ChatProtocol(Tokenizer.from_directory(Path(directory)))
    device = torch.device("cuda", 0)
    limits = Limits(
        max_streams=sessions,
        max_context=MAX_CONTEXT,
        max_prefill=MAX_PREFILL,
        max_patches=max_patches,
    )
    executor = CudaExecutor(
        config,
        preprocess,
        RandomWeights(config, quantization_of(config, precisions), device),
        limits,
        num_pages=sessions * (MAX_CONTEXT // PAGE_SIZE) + 1,
        page_size=PAGE_SIZE,
        dtype=DTYPE,
        vision_dtype=DTYPE,
        device=device,
        operations=kernel_operations,
    )
    return StreamingEngine(
        executor,
        config,
        protocol,
        preprocess,
        StreamingDefaults(),
        limits,
        executor_reason=f"cuda on the GPU: random weights of {size}, {precisions}.",
    )
