"""The vision half of the executor: from host memory to embeddings, beside the steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.executors.cuda.gpu_clock import GpuClock
from framesink.runtime.executors.cuda.layers import Layers
from framesink.runtime.executors.cuda.operations import Operations
from framesink.runtime.executors.cuda.patches import Patchifier
from framesink.runtime.executors.cuda.side_stream import SideStream
from framesink.runtime.executors.cuda.vision_encoder import VisionEncoder
from framesink.runtime.executors.cuda.weight_source import WeightSource
from framesink.runtime.executors.cuda.weights import load_vision_encoder
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.preprocess import Grid, PreprocessConfig

# Every number of chunks that go together has a CUDA graph of its own: these and no others.
TOGETHER = (8, 4, 2, 1)


class VisionPart:
    """Encodes chunks in a CUDA stream of its own; `join` lets the steps wait for what they read."""

    def __init__(
        self,
        config: VisionConfig,
        preprocess: PreprocessConfig,
        weights: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        operations: Operations,
        clock: GpuClock | None,
    ) -> None:
        """`dtype` is the compute type. `clock` is told how long the GPU works."""
        self._dtype = dtype
        self._device = device
        self._clock = clock
        self._beside = SideStream(device)
        self._patchifier = Patchifier(preprocess, operations, device)
        self._encoder = VisionEncoder(
            config,
            load_vision_encoder(weights, config, dtype),
            Layers(operations, dtype),
            device,
        )

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Tensor:
        """See `framesink.runtime.executors.base.VisionEncoder`; the embeddings stay on the GPU."""

        def fill(out: Tensor) -> None:
            out.copy_(torch.from_numpy(patches))

        return self._encode(fill, grid)

    def hold_frames(self, frames: UInt8Array) -> Tensor:
        """A copy in memory that the GPU reads by itself. May be called from any thread."""
        held = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        held.numpy()[...] = frames
        return held

    def encode_frames(self, chunks: Sequence[Tensor], grid: Grid) -> list[Tensor]:
        """See `framesink.runtime.executors.base.FrameEncoder`."""
        found: list[Tensor] = []
        for part in _parts(chunks):
            whole = Grid(len(part) * grid.t, grid.h, grid.w)

            def fill(out: Tensor, part: Sequence[Tensor] = part) -> None:
                shape = (len(part), *part[0].shape)
                frames = torch.empty(shape, dtype=torch.uint8, device=self._device)
                for place, held in zip(frames, part, strict=True):
                    place.copy_(held, non_blocking=True)
                self._patchifier.fill(frames, grid, out)

            found += self._encode(fill, whole).chunk(len(part))
        return found

    def join(self, embeddings: Iterable[Tensor]) -> None:
        """Let the current stream wait for `embeddings`, or slices of them."""
        self._beside.join(embeddings)

    def _encode(self, fill: Callable[[Tensor], None], grid: Grid) -> Tensor:
        def measured() -> Tensor:
            with nullcontext() if self._clock is None else self._clock.measure("vision"):
                return self._encoder.encode(fill, grid)

        with torch.no_grad():
            return self._beside.run(measured)


def _parts(chunks: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Chunks in groups of the sizes `TOGETHER`, the largest first."""
    start = 0
    while start < len(chunks):
        size = next(size for size in TOGETHER if size <= len(chunks) - start)
        yield chunks[start : start + size]
        start += size
