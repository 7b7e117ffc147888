"""How a product of codes is cut into programs, by its shape: chosen by measurement on an H200."""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Tiling:
    """One program makes a tile of `channels` × `rows` of the output, `depth` inputs at a time, over
    one of `splits` parts of all inputs; `stages` tiles are on their way at once."""

    channels: int
    rows: int
    depth: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


# Up to so many rows the bytes of the weight are what takes time.
FEW_ROWS = 64
# What the left operand of a matrix instruction needs.
LEAST_CHANNELS = 64
# In how many tiles of rows a sum can be made that is split.
MOST_ROW_TILES = 8
# Programs per multiprocessor that sums of few rows are split for, with up to 32 rows (else 1), and
# the fewest inputs of a part: with up to 16 rows, whose parts cost little, and with more.
_PROGRAMS = 1.7
_LEAST_DEPTH = 1024
_LEAST_DEPTH_OF_PARTS = 5120
# Tiles of more rows: small ones, of which as many run at once on a multiprocessor, where there are
# no more of them than that; else large ones, whose operands are read less often.
_SMALL = Tiling(channels=64, rows=128, depth=128)
_SMALL_TOGETHER = 2
_LARGE = Tiling(channels=128, rows=128, depth=128, warps=8, stages=3)
_LARGE_FP8 = replace(_LARGE, rows=256)


def choose_tiling(
    rows: int, channels: int, depth: int, code_type: torch.dtype, device: torch.device
) -> Tiling:
    """The tiling for `rows` tokens through a layer of `channels` outputs and `depth` inputs."""
    processors, shared_memory = _limits(device)
    if rows > FEW_ROWS:
        tiling = _many_rows(rows, channels, depth, code_type, processors)
    else:
        tiling = _few_rows(rows, channels, depth, processors)
    stage = (tiling.channels + tiling.rows) * tiling.depth
    return replace(tiling, stages=min(tiling.stages, shared_memory // stage))


def _few_rows(rows: int, channels: int, depth: int, processors: int) -> Tiling:
    """Measured in a chain of a layer's products, which start while others end: what is fastest by
    itself need not be."""
    tile_rows = max(16, 1 << (rows - 1).bit_length())
    tiles = -(-channels // LEAST_CHANNELS)
    programs = int(processors * (_PROGRAMS if tile_rows <= 32 else 1))
    least_depth = _LEAST_DEPTH if tile_rows == 16 else _LEAST_DEPTH_OF_PARTS
    # Rows of 256 bytes are long enough for the memory.
    tiling = Tiling(
        LEAST_CHANNELS,
        tile_rows,
        depth=256,
        splits=max(1, min(programs // tiles, depth // least_depth)),
    )
    if tiles > 2 * processors:
        # Many programs share a multiprocessor's memory.
        return replace(tiling, depth=128) if tile_rows > 32 else replace(tiling, stages=3)
    return tiling if tile_rows == 16 else replace(tiling, stages=5)


def _many_rows(
    rows: int, channels: int, depth: int, code_type: torch.dtype, processors: int
) -> Tiling:
    row_tiles = -(-rows // _SMALL.rows)
    tiles = row_tiles * -(-channels // _SMALL.channels)
    together = _SMALL_TOGETHER * processors
    if tiles > together:
        return _LARGE if code_type is torch.int8 else _LARGE_FP8
    if row_tiles > MOST_ROW_TILES:
        return _SMALL
    return replace(_SMALL, splits=max(1, min(together // tiles, depth // _LEAST_DEPTH)))


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory in bytes that one program may have."""
    if device.type != "cuda":
        return 1, 1 << 17
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
