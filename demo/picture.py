"""The README's picture, from a clip and what was said about it:

framesink stream demo/clip.mp4 --engines bundles/demo --jsonl captions.jsonl
python -m demo.picture demo/clip.mp4 captions.jsonl docs/demo.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from framesink.runtime.arrays import UInt8Array

COLUMNS = 4
TILE = 240
GAP = 14
CAPTION = 34
PAPER = (252, 252, 250)
INK = (30, 30, 34)
FONT = cv2.FONT_HERSHEY_DUPLEX
FONT_SCALE = 0.44


def frame_at(clip: Path, seconds: float) -> UInt8Array:
    """The frame of a clip at a second, BGR uint8 `[TILE, TILE, 3]`."""
    capture = cv2.VideoCapture(str(clip))
    try:
        capture.set(cv2.CAP_PROP_POS_MSEC, seconds * 1000)
        found, frame = capture.read()
    finally:
        capture.release()
    if not found:
        raise SystemExit(f"{clip} has no frame at {seconds} s.")
    resized: UInt8Array = cv2.resize(frame, (TILE, TILE), interpolation=cv2.INTER_AREA)
    return resized


def sheet(clip: Path, replies: list[dict[str, Any]]) -> UInt8Array:
    """One tile per reply: the frame it speaks of, and its words below."""
    rows = -(-len(replies) // COLUMNS)
    height = rows * (TILE + CAPTION + GAP) + GAP
    picture = np.full((height, COLUMNS * (TILE + GAP) + GAP, 3), PAPER[::-1], np.uint8)
    for index, reply in enumerate(replies):
        row, column = divmod(index, COLUMNS)
        top, left = GAP + row * (TILE + CAPTION + GAP), GAP + column * (TILE + GAP)
        picture[top : top + TILE, left : left + TILE] = frame_at(clip, reply["t0"] + 0.5)
        text = f"{reply['t0']:.0f} s {reply['text'].strip()}"
        place = (left, top + TILE + CAPTION - 14)
        cv2.putText(picture, text, place, FONT, FONT_SCALE, INK[::-1], 1, cv2.LINE_AA)
    return picture


def main() -> None:
    """Pick the first commentary replies and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("captions", type=Path, help="JSON lines of `framesink stream --jsonl`")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiles", type=int, default=2 * COLUMNS)
    parser.add_argument("--from-second", type=float, default=0.0)
    options = parser.parse_args()
    lines = options.captions.read_text(encoding="utf-8").splitlines()
    spoken = [
        reply
        for reply in map(json.loads, lines)
        if reply["kind"] == "commentary" and reply["t0"] >= options.from_second
    ]
    cv2.imwrite(str(options.output), sheet(options.clip, spoken[: options.tiles]))


if __name__ == "__main__":
    main()
