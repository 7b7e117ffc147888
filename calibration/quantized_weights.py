"""The weight file of a quantized checkpoint: planned, then streamed from the 16-bit one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from framesink.calibration.encode import LinearEncoder
from framesink.calibration.weight_blocks import plain_blocks
from framesink.runtime.arrays import AnyArray
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.safetensors_writer import SafetensorsWriter, TensorLayout


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeights:
    """What becomes of every tensor of `checkpoint`: `encoders` write linear layers (by name),
    `replaced` tensors have another content of the same type and shape, `added` are new; all others
    are copied."""

    checkpoint: Checkpoint
    encoders: Mapping[str, LinearEncoder]
    replaced: Mapping[str, AnyArray]
    added: Mapping[str, AnyArray]

    def write(self, path: Path, on_progress: Callable[[float], None]) -> int:
        """Write the safetensors file; returns its size in bytes.

        Raises OSError if it cannot be written, CheckpointError for a weight that is NaN or
        infinite.
        """
        names = self.checkpoint.names()
        total = sum(self.checkpoint.info(name).nbytes for name in names)
        done = 0
        with SafetensorsWriter(path, self._layout(names)) as writer:
            for name in names:
                for target, block in self._blocks(name):
                    writer.write(target, block)
                done += self.checkpoint.info(name).nbytes
                on_progress(done / total)
            for name, tensor in self.added.items():
                writer.write(name, tensor)
        return writer.size

    def _layout(self, names: list[str]) -> dict[str, TensorLayout]:
        layout: dict[str, TensorLayout] = {}
        for name in names:
            encoder = self._encoder(name)
            info = self.checkpoint.info(name)
            layout |= encoder.layout() if encoder else {name: (info.dtype, info.shape)}
        return layout | {
            name: (value.dtype.name, value.shape) for name, value in self.added.items()
        }

    def _blocks(self, name: str) -> Iterator[tuple[str, AnyArray]]:
        encoder = self._encoder(name)
        if encoder is not None:
            yield from encoder.blocks()
            return
        tensor = self.replaced[name] if name in self.replaced else self.checkpoint.read(name)
        for block in plain_blocks(tensor):
            yield name, block

    def _encoder(self, tensor: str) -> LinearEncoder | None:
        """The encoder that writes a tensor of the 16-bit checkpoint."""
        linear, _, kind = tensor.rpartition(".")
        return self.encoders.get(linear) if kind == "weight" else None
