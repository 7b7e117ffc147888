"""What is drawn of a file of results."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ChunkParts:
    """Milliseconds of one stream's chunk: what the GPU works on its frames, its prompt and its
    decode steps, and `host`, the rest, in which it waits."""

    vision: float
    prefill: float
    decode: float
    host: float

    @property
    def total(self) -> float:
        """The whole chunk."""
        return self.vision + self.prefill + self.decode + self.host


@dataclass(frozen=True, slots=True)
class ResultFigures:
    """Of one file: `chunk` as measured and at its `floor`, and how many streams were live, of
    `live_floor` that fill a second; None for what the file does not hold."""

    precision: str
    gpu: str
    chunk: ChunkParts
    floor: ChunkParts
    live: int | None
    live_floor: int | None


def read_figures(path: Path) -> ResultFigures | None:
    """A file's figures; None of one without a chunk that was measured beside its floor."""
    content = json.loads(path.read_text("utf-8"))
    chunk = content.get("chunk")
    if not chunk or not chunk.get("gpu") or not chunk.get("floor"):
        return None
    return ResultFigures(
        precision=content["precision"],
        gpu=content["gpu"],
        chunk=measured_parts(chunk),
        floor=floor_parts(chunk),
        live=content.get("live_streams"),
        live_floor=content.get("live_streams_floor"),
    )


def measured_parts(chunk: Mapping[str, Any]) -> ChunkParts:
    """The medians of a chunk benchmark, taken together."""
    gpu, steps = chunk["gpu"], chunk["tokens_per_chunk"] - 1
    vision, prefill = 1000 * gpu["vision"]["p50"], 1000 * gpu["prefill"]["p50"]
    decode = 1000 * steps * gpu["decode_step"]["p50"]
    host = 1000 * chunk["chunk"]["p50"] - vision - prefill - decode
    return ChunkParts(vision, prefill, decode, max(0.0, host))


def floor_parts(chunk: Mapping[str, Any]) -> ChunkParts:
    """The least each part could take."""
    floor, steps = chunk["floor"], chunk["tokens_per_chunk"] - 1
    decode = 1000 * steps * floor["decode_step"]
    return ChunkParts(1000 * floor["vision"], 1000 * floor["prefill"], decode, 0.0)
