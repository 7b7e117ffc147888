"""How a product of codes is cut into programs, by its shape: chosen by measurement."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tiling:
    """One program makes a tile of `channels` × `rows` of the output, `depth` inputs at a time, over
    one of `splits` parts of all inputs. `stages` tiles are on their way at once."""

    channels: int
    rows: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


_FEW_ROWS = 64
_PREFILL = Tiling(channels=128, rows=128, depth=128, warps=8, stages=3)
# Programs per multiprocessor that keep the memory busy.
_PROGRAMS = 2
_MAX_SPLITS = 8


def choose_tiling(rows: int, channels: int, depth: int, device: torch.device) -> Tiling:
    """The tiling for `rows` tokens through a layer of `channels` outputs and `depth` inputs."""
    if rows > _FEW_ROWS:
        return _PREFILL
    tile_rows = max(16, 1 << (rows - 1).bit_length())
    tile_depth = 256 if depth >= 1024 else 64
    tiles = -(-channels // 64)
    splits = 1
    if device.type == "cuda":
        wanted = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
        steps = -(-depth // tile_depth)
        splits = max(1, min(wanted // tiles, steps // 2, _MAX_SPLITS))
    return Tiling(channels=64, rows=tile_rows, depth=tile_depth, splits=splits)
