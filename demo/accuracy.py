"""Measures what quantization costs the demo model; prints Markdown tables (docs/accuracy.md).

    python -m demo.accuracy schemes WORK    every precision of weights and cache, in real bundles
    python -m demo.accuracy caches WORK     ways to store keys, on the model and on its K-bias twin
    python -m demo.accuracy drift WORK      agreement along one long stream

WORK is a folder for calibration videos, bundles, the twin and results; what is there already is not
made again. Scenes are held out; each is shown as live video, with its questions.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.accuracy_bundles import (
    CACHE_PRECISIONS,
    LINEAR_PRECISIONS,
    build,
    size_of,
    write_calibration_videos,
)
from demo.cache_accuracy import compare_checkpoints, measure_caches
from demo.held_out import (
    Result,
    compare_on_scenes,
    held_out_scenes,
    score_engine,
    stream_of,
)
from demo.scene import Scene
from demo.twin import DEFAULT_PAIRS, DEFAULT_SIZE, write_twin
from framesink.calibration.agreement import Agreement, replay_turn
from framesink.calibration.recorded_turns import RecordedTurn, StreamSettings, record_turns
from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import Executor

MODEL = Path(__file__).parent / "model"
TOGETHER = 8
DRIFT_SCHEMES = (("fp16", "int8"), ("fp8", "fp16"))
DRIFT_WINDOW = 30


@dataclass(frozen=True, slots=True)
class Run:
    """Where things lie, which scenes are narrated, and on which of them tokens are compared."""

    work: Path
    checkpoint: Path
    scenes: Sequence[Scene]
    compared: Sequence[Scene]
    threads: int | None
    twin_size: float

    @property
    def videos(self) -> Path:
        """The folder of calibration videos."""
        return write_calibration_videos(self.work / "calibration")

    def bundle(self, precision: str, cache: str) -> Path:
        """The bundle of a precision."""
        output = self.work / "bundles" / f"{precision}-kv-{cache}"
        output.parent.mkdir(parents=True, exist_ok=True)
        return build(self.checkpoint, output, precision, cache, self.videos, TOGETHER)

    def executor(self, bundle: Bundle) -> Executor:
        """ONNX Runtime over a bundle, with pages for one session."""
        pages = StreamSettings.from_bundle(bundle).num_pages(bundle.manifest.page_size)
        return create_executor(bundle, "onnxruntime", num_pages=pages, threads=self.threads)[0]

    def saved(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result of an earlier run on the same scenes, or what `measure` finds now."""
        first = self.scenes[0]
        shown = f"{first.seed}-{len(self.scenes)}x{first.seconds}-{len(self.compared)}"
        path = self.work / "results" / shown / f"{name}.json"
        if not path.exists():
            found = measure()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2) + "\n")
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded


def measure_schemes(run: Run) -> Iterator[list[str]]:
    """A row per precision of weights and cache, from real bundles in ONNX Runtime."""
    yield ["weights", "K/V", *HEADINGS, "bundle"]
    reference = Bundle.open(run.bundle("fp16", "fp16"))
    recorded: list[RecordedTurn] = []
    for cache in CACHE_PRECISIONS:
        for precision in LINEAR_PRECISIONS:

            def measure(precision: str = precision, cache: str = cache) -> dict[str, Any]:
                if not recorded:
                    recorded.extend(_record(run, reference))
                return _measure_bundle(run, run.bundle(precision, cache), recorded).to_json()

            found = Result(**run.saved(f"{precision}-kv-{cache}", measure))
            yield [precision, cache, *_cells(found), f"{found.size / 1e6:.1f} MB"]


def measure_cache_forms(run: Run) -> Iterator[list[str]]:
    """A row per way to store keys, simulated in torch, on the model and on its twin."""
    yield ["model", "keys", "format", *HEADINGS]
    twin_name = f"twin-{run.twin_size:g}"
    twin = run.work / twin_name
    if not twin.exists():
        write_twin(run.checkpoint, twin, size=run.twin_size, pairs=DEFAULT_PAIRS)
    bundle = Bundle.open(run.bundle("fp16", "fp16"))
    settings, page_size = StreamSettings.from_bundle(bundle), bundle.manifest.page_size

    def compare() -> dict[str, Any]:
        return compare_checkpoints(run.checkpoint, twin, settings, run.scenes, page_size).to_json()

    found = Result(**run.saved(twin_name, compare))
    yield ["twin against the model", "16-bit pages", "16bit", *_cells(found)]
    for name, directory in (("model", run.checkpoint), (twin_name, twin)):

        def measure(directory: Path = directory) -> dict[str, Any]:
            rows = measure_caches(directory, [run.videos], settings, run.scenes, page_size)
            return {"rows": [[form, scheme, result.to_json()] for form, scheme, result in rows]}

        for form, scheme, values in run.saved(f"caches-{name}", measure)["rows"]:
            yield [name, form, scheme, *_cells(Result(**values))]


def measure_drift(run: Run) -> Iterator[list[str]]:
    """A row per stretch of the stream: mean KL and top-1 of some schemes against 16-bit."""
    names = [f"{precision}, K/V {cache}" for precision, cache in DRIFT_SCHEMES]
    yield ["chunks", *(f"{name}: {what}" for name in names for what in ("KL", "top-1"))]

    def measure() -> dict[str, Any]:
        reference = Bundle.open(run.bundle("fp16", "fp16"))
        candidates = {
            name: run.executor(Bundle.open(run.bundle(*scheme)))
            for name, scheme in zip(names, DRIFT_SCHEMES, strict=True)
        }
        settings = StreamSettings.from_bundle(reference)
        turns = compare_on_scenes(run.executor(reference), candidates, settings, run.scenes)
        return {
            name: [[turn.chunk, *_sums(turn.kl, turn.same)] for turn in found]
            for name, found in turns.items()
        }

    found = run.saved("drift", measure)
    for start in range(0, run.scenes[0].seconds, DRIFT_WINDOW):
        cells = [f"{start} to {min(start + DRIFT_WINDOW, run.scenes[0].seconds) - 1}"]
        for name in names:
            inside = [t for t in found[name] if start <= t[0] < start + DRIFT_WINDOW]
            tokens = sum(turn[1] for turn in inside)
            kl, same = sum(turn[2] for turn in inside), sum(turn[3] for turn in inside)
            cells += [f"{kl / tokens:.2e}", f"{same / tokens:.4f}"]
        yield cells


HEADINGS = ("event F1", "counts", "answers", "mean KL", "top-1")
PARTS = {"schemes": measure_schemes, "caches": measure_cache_forms, "drift": measure_drift}


def _record(run: Run, bundle: Bundle) -> Iterator[RecordedTurn]:
    """Every turn of the 16-bit bundle over the scenes that are compared."""
    executor, settings = run.executor(bundle), StreamSettings.from_bundle(bundle)
    for scene in run.compared:
        chunks, questions = stream_of(scene)
        yield from record_turns(executor, settings, chunks, questions=questions)


def _measure_bundle(run: Run, directory: Path, recorded: Sequence[RecordedTurn]) -> Result:
    with StreamingEngine.load(
        directory, "onnxruntime", max_sessions=TOGETHER, threads=run.threads, threaded=False
    ) as engine:
        score = score_engine(engine, run.scenes)
    executor = run.executor(Bundle.open(directory))
    agreement = Agreement.of(replay_turn(turn, executor) for turn in recorded)
    return Result.of(score, agreement, chunks=len(recorded), size=size_of(directory))


def _sums(kl: Sequence[float], same: Sequence[bool]) -> tuple[int, float, int]:
    return len(kl), sum(kl), sum(same)


def _cells(found: Result) -> list[str]:
    scores = (found.event_f1, found.counts, found.answers)
    return [*(f"{value:.3f}" for value in scores), f"{found.kl:.1e}", f"{found.top1:.4f}"]


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
    parser.add_argument("--compared", type=int, default=8, help="scenes tokens are compared on")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of ONNX Runtime")
    parser.add_argument("--twin-size", type=float, default=DEFAULT_SIZE, help="of the twin's bias")
    options = parser.parse_args()
    scenes = held_out_scenes(options.first_seed, options.scenes, options.seconds)
    compared = scenes[: options.compared]
    run = Run(
        options.work, options.checkpoint, scenes, compared, options.threads, options.twin_size
    )
    for number, cells in enumerate(PARTS[options.part](run)):
        print(_row(cells), flush=True)
        if number == 0:
            print(_row(["---"] * len(cells)), flush=True)


if __name__ == "__main__":
    main()
