"""Bundles of a checkpoint in every precision, made by the `build-engines` command."""

import subprocess
import sys
from pathlib import Path

from demo.render import write_video
from demo.world import TRAINING_SEEDS_START, make_scene

LINEAR_PRECISIONS = ("fp16", "fp8", "int8", "int8-weight-only", "int4-weight-only")
CACHE_PRECISIONS = ("fp16", "int8", "fp8")
CALIBRATION_SCENES = 4
CALIBRATION_SECONDS = 32


def write_calibration_videos(folder: Path) -> Path:
    """Videos of training scenes, `CALIBRATION_SECONDS` each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(TRAINING_SEEDS_START, TRAINING_SEEDS_START + CALIBRATION_SCENES):
        path = folder / f"{seed}.mp4"
        if not path.exists():
            write_video(make_scene(seed, CALIBRATION_SECONDS), path)
    return folder


def build(
    checkpoint: Path, output: Path, precision: str, cache: str, videos: Path, max_streams: int
) -> Path:
    """Build a bundle without plans, unless it is there already; returns its directory."""
    if output.exists():
        return output
    command = [
        *(str(Path(sys.executable).with_name("build-engines")), str(checkpoint), "-o", str(output)),
        *("--precision", precision, "--kv-precision", cache, "--calibration-video", str(videos)),
        *("--no-plans", "--no-gate", "--max-streams", str(max_streams)),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def size_of(bundle: Path) -> int:
    """Bytes of all files of a bundle."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
