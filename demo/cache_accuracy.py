"""Ways to store keys in one byte, simulated on a checkpoint whose rest stays as it is."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from demo.held_out import Result, compare_on_scenes, score_engine
from demo.scene import Scene
from framesink.calibration.agreement import Agreement
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
from framesink.calibration.streaming import observe_streaming
from framesink.calibration.torch_executor import TorchExecutor
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import CacheScheme

CALIBRATION_CHUNKS = 128


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
    videos: Sequence[Path],
    settings: StreamSettings,
    scenes: Sequence[Scene],
    page_size: int,
) -> Iterator[tuple[str, str, Result]]:
    """Form, format and result of each way to store keys, against 16-bit pages."""
    checkpoint = Checkpoint.open(directory)
    statistics = observe_streaming(checkpoint, settings, videos, chunks=CALIBRATION_CHUNKS)
    pages = settings.num_pages(page_size)

    def executor(cache: FakeCache | None) -> TorchExecutor:
        numerics = FakeQuantization({}, cache)
        return TorchExecutor(checkpoint, num_pages=pages, page_size=page_size, numerics=numerics)

    forms = {(form, scheme): cache for form, scheme, cache in cache_forms(checkpoint, statistics)}
    candidates = {f"{form}, {scheme}": executor(cache) for (form, scheme), cache in forms.items()}
    turns = compare_on_scenes(executor(None), candidates, settings, scenes)
    for (form, scheme), (name, candidate) in zip(forms, candidates.items(), strict=True):
        with settings.engine(candidate) as engine:
            score = score_engine(engine, scenes)
        agreement = Agreement.of(turns[name])
        yield form, scheme.value, Result.of(score, agreement, chunks=len(turns[name]))


def compare_checkpoints(
    reference: Path, other: Path, settings: StreamSettings, scenes: Sequence[Scene], page_size: int
) -> Result:
    """How far one unquantized checkpoint is from another, and what it scores."""
    pages = settings.num_pages(page_size)
    first, second = (
        TorchExecutor(Checkpoint.open(path), num_pages=pages, page_size=page_size)
        for path in (reference, other)
    )
    turns = compare_on_scenes(first, {"other": second}, settings, scenes)["other"]
    with settings.engine(second) as engine:
        score = score_engine(engine, scenes)
    return Result.of(score, Agreement.of(turns), chunks=len(turns))
