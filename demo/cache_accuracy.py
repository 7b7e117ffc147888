"""Ways to store keys in one byte, simulated on a checkpoint whose rest stays as it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.accuracy_bundles import observe, settings_of
from demo.accuracy_run import Run
from demo.held_out import Result, compare_on_scenes, narrate_scenes, score_replies
from demo.scene import Scene
from demo.twin import DEFAULT_PAIRS, write_twin
from framesink.calibration.fake_cache import FakeCache
from framesink.calibration.fake_quantization import FakeQuantization
from framesink.calibration.recorded_turns import StreamSettings
from framesink.calibration.simulation import (
    simulate_biased_cache,
    simulate_cache,
    simulate_pair_cache,
    simulate_rotated_cache,
)
from framesink.calibration.statistics import Statistics
from framesink.calibration.torch_executor import DEFAULT_PAGE_SIZE, TorchExecutor
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme


def rows(run: Run) -> Iterator[list[str]]:
    """A row per way to store keys, simulated in torch, on the model and on its twin."""
    yield ["model", "keys", "format", "event F1", "counts", "answers", "mean KL", "top-1"]
    twin_name = f"twin-{run.twin_size:g}"
    twin = run.work / twin_name
    if not twin.exists():
        write_twin(run.checkpoint, twin, size=run.twin_size, pairs=DEFAULT_PAIRS)
    seeds = f"{run.scenes[0].seed}-{run.scenes[-1].seed}"
    pair = CheckpointPair(run.checkpoint, twin, run.scenes)
    (found,) = run.find(_compare, {f"{twin_name}-{seeds}": pair}).values()
    yield ["twin against the model", "16-bit pages", "16bit", *_cells(Result(**found))]
    tasks = {
        name: CacheTask(directory, run.work / f"statistics-{name}", run.scenes)
        for name, directory in (("model", run.checkpoint), (twin_name, twin))
    }
    measured = run.find(_measure, {f"caches-{name}-{seeds}": task for name, task in tasks.items()})
    for name, rows_found in zip(tasks, measured.values(), strict=True):
        for form, scheme, values in rows_found:
            yield [name, form, scheme, *_cells(Result(**values))]


@dataclass(frozen=True, slots=True)
class CheckpointPair:
    """Checkpoints to compare over scenes."""

    reference: Path
    other: Path
    scenes: Sequence[Scene]


@dataclass(frozen=True, slots=True)
class CacheTask:
    """A checkpoint, and where what calibration sees of it is kept, for caches to be compared."""

    checkpoint: Path
    statistics: Path
    scenes: Sequence[Scene]


def cache_forms(
    checkpoint: Checkpoint, statistics: Statistics
) -> Iterator[tuple[str, CacheScheme, FakeCache | None]]:
    """Each form that is compared, in words and in both one-byte formats; first 16-bit pages."""
    yield "16-bit pages", CacheScheme.UNQUANTIZED, None
    for scheme in (CacheScheme.INT8, CacheScheme.FP8):
        yield (
            "per channel, before RoPE, without bias (graphs)",
            scheme,
            simulate_cache(statistics, scheme),
        )
        yield "per rotary pair, without bias", scheme, simulate_pair_cache(statistics, scheme)
        yield (
            "naive: per channel, before RoPE, with bias",
            scheme,
            simulate_biased_cache(statistics, scheme, checkpoint),
        )
        yield (
            "naive: per tensor, after RoPE, with bias",
            scheme,
            simulate_rotated_cache(statistics, scheme),
        )


def measure_caches(
    directory: Path,
    statistics: Path,
    settings: StreamSettings,
    scenes: Sequence[Scene],
) -> Iterator[tuple[str, str, Result]]:
    """Form, format and result of each way to store keys, against 16-bit pages.

    What calibration sees of the checkpoint in `directory` is kept in `statistics`.
    """
    checkpoint = Checkpoint.open(directory)
    observed = observe(directory, statistics)
    pages = settings.num_pages(DEFAULT_PAGE_SIZE)

    def executor(cache: FakeCache | None) -> TorchExecutor:
        numerics = FakeQuantization({}, cache)
        return TorchExecutor(checkpoint, num_pages=pages, numerics=numerics)

    forms = {(form, scheme): cache for form, scheme, cache in cache_forms(checkpoint, observed)}
    candidates = {f"{form}, {scheme}": executor(cache) for (form, scheme), cache in forms.items()}
    turns = compare_on_scenes(executor(None), candidates, settings, scenes)
    for (form, scheme), (name, candidate) in zip(forms, candidates.items(), strict=True):
        with settings.engine(candidate) as engine:
            score = score_replies(scenes, narrate_scenes(engine, scenes))
        yield form, scheme.value, Result.of(score, turns[name])


def compare_checkpoints(
    reference: Path, other: Path, settings: StreamSettings, scenes: Sequence[Scene]
) -> Result:
    """How far one unquantized checkpoint is from another, and what it scores."""
    pages = settings.num_pages(DEFAULT_PAGE_SIZE)
    first, second = (
        TorchExecutor(Checkpoint.open(path), num_pages=pages) for path in (reference, other)
    )
    turns = compare_on_scenes(first, {"other": second}, settings, scenes)["other"]
    with settings.engine(second) as engine:
        score = score_replies(scenes, narrate_scenes(engine, scenes))
    return Result.of(score, turns)


def _compare(pair: CheckpointPair) -> dict[str, Any]:
    settings = settings_of(pair.reference)
    return compare_checkpoints(pair.reference, pair.other, settings, pair.scenes).to_json()


def _measure(task: CacheTask) -> list[list[Any]]:
    settings = settings_of(task.checkpoint)
    rows = measure_caches(task.checkpoint, task.statistics, settings, task.scenes)
    return [[form, scheme, result.to_json()] for form, scheme, result in rows]


def _cells(found: Result) -> list[str]:
    scores = (found.event_f1, found.counts, found.answers)
    return [*(f"{value:.3f}" for value in scores), f"{found.kl:.1e}", f"{found.top1:.4f}"]
