"""How a product of codes is cut into programs, by its shape: chosen by measurement on an H200."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tiling:
    """One program makes a tile of `channels` × `rows` of the output, `depth` inputs at a time, over
    one of `splits` parts of all inputs. `stages` tiles are on their way at once, and the first
    `prefetched` bytes of each channel before the inputs are there."""

    channels: int
    rows: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    prefetched: int = 0


# Up to so many rows the bytes of the weight are what takes time.
_FEW_ROWS = 64
_MAX_SPLITS = 8
# Small tiles, so that all programs run at once and share the memory evenly.
_PROGRAMS = 3


def choose_tiling(
    rows: int, channels: int, depth: int, code_type: torch.dtype, device: torch.device
) -> Tiling:
    """The tiling for `rows` tokens through a layer of `channels` outputs and `depth` inputs."""
    if rows > _FEW_ROWS:
        wide = code_type is not torch.int8
        return Tiling(channels=128, rows=256 if wide else 128, depth=128, warps=8, stages=3)
    tile_rows = max(16, 1 << (rows - 1).bit_length())
    tiles = -(-channels // 64)
    splits = 1
    if device.type == "cuda":
        programs = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
        splits = max(1, min(programs // tiles, depth // 512, _MAX_SPLITS))
    return Tiling(channels=64, rows=tile_rows, depth=128, splits=splits)


def suits_library(
    rows: int, channels: int, depth: int, code_type: torch.dtype, out_type: torch.dtype
) -> bool:
    """Whether `torch._scaled_mm`, scaled by row and channel, is the faster one: for many rows
    through wide layers. It writes bfloat16 alone and wants multiples of 16."""
    return (
        code_type is torch.float8_e4m3fn
        and out_type is torch.bfloat16
        and rows > _FEW_ROWS
        and channels >= 4096 > depth // 4
        and channels % 16 == depth % 16 == 0
    )
