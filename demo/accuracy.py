"""Measures what quantization costs the demo model; prints Markdown tables (docs/accuracy.md).

    python -m demo.accuracy schemes WORK    every precision of weights and cache, in real bundles
    python -m demo.accuracy caches WORK     ways to store keys, on the model and on its K-bias twin
    python -m demo.accuracy drift WORK      agreement along long streams, in real bundles
    python -m demo.accuracy ageing WORK     whether errors add up along them, in real bundles

WORK is a folder for calibration videos, bundles, the twin and results; what is there already is not
made again. Scenes are held out; each is shown as live video, with its questions. With several
processes set OMP_NUM_THREADS=1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from demo import cache_accuracy, scheme_accuracy, stream_accuracy
from demo.accuracy_run import Run
from demo.held_out import held_out_scenes
from demo.twin import DEFAULT_SIZE

MODEL = Path(__file__).parent / "model"
PARTS = {
    "schemes": scheme_accuracy.rows,
    "caches": cache_accuracy.rows,
    "drift": stream_accuracy.drift_rows,
    "ageing": stream_accuracy.ageing_rows,
}


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure one part and print its table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("work", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=100, help="length of every scene")
    parser.add_argument("--first-seed", type=int, default=4000)
    parser.add_argument("--event-rate", type=float, help="chance of an event in a chunk")
    parser.add_argument("--compared", type=int, default=8, help="scenes tokens are compared on")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--twin-size", type=float, default=DEFAULT_SIZE, help="of the twin's bias")
    options = parser.parse_args()
    scenes = held_out_scenes(
        options.first_seed, options.scenes, options.seconds, options.event_rate
    )
    run = Run(
        options.work,
        options.checkpoint,
        scenes,
        scenes[: options.compared],
        options.processes,
        options.twin_size,
        options.event_rate,
    )
    for number, cells in enumerate(PARTS[options.part](run)):
        print(_row(cells), flush=True)
        if number == 0:
            print(_row(["---"] * len(cells)), flush=True)


if __name__ == "__main__":
    main()
