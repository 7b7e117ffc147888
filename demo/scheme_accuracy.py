"""Every precision of weights and cache, in real bundles executed by ONNX Runtime."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.accuracy_bundles import (
    CACHE_PRECISIONS,
    LINEAR_PRECISIONS,
    MAX_STREAMS,
    Scheme,
    scheme_name,
    size_of,
)
from demo.accuracy_run import CompareTask, Run, compare_bundles, turns_from_json
from demo.held_out import Result, narrate_scenes, score_replies
from demo.world import make_scene
from framesink.build.accuracy import AccuracyRow, AccuracyTable, attach_accuracy
from framesink.runtime.engine import StreamingEngine

SCHEMES: list[Scheme] = [
    (precision, cache) for cache in CACHE_PRECISIONS for precision in LINEAR_PRECISIONS
]


@dataclass(frozen=True, slots=True)
class NarrateTask:
    """Scenes for a bundle to narrate together."""

    bundle: Path
    seeds: tuple[int, ...]
    seconds: int


@dataclass(frozen=True, slots=True)
class SchemeResult:
    """What a scheme scores, and in how many chunks it says something else than 16-bit does."""

    scheme: Scheme
    result: Result
    changed: int
    narrated: int


def measure_schemes(run: Run) -> list[SchemeResult]:
    """A result per scheme. The table goes into every bundle it was measured on."""
    bundles = run.bundles(SCHEMES)
    found = _measured(run, bundles)
    plain = found["fp16", "fp16"]["replies"]
    results = []
    for scheme, values in found.items():
        said = values["replies"]
        results.append(
            SchemeResult(
                scheme,
                Result.of(
                    score_replies(run.scenes, said),
                    turns_from_json(values["turns"]),
                    size=size_of(bundles[scheme]),
                ),
                changed=sum(
                    text != other
                    for texts, others in zip(said, plain, strict=True)
                    for text, other in zip(texts, others, strict=True)
                ),
                narrated=sum(len(texts) for texts in said),
            )
        )
    table = accuracy_table(run, results)
    for bundle in bundles.values():
        attach_accuracy(bundle, table)
    return results


def accuracy_table(run: Run, results: list[SchemeResult]) -> AccuracyTable:
    """The results as a bundle holds them."""
    first, seconds = run.scenes[0].seed, run.scenes[0].seconds
    truth = [chunk for scene in run.scenes for chunk in scene.truth]
    events = sum(chunk.event is not None for chunk in truth)
    questions = sum(chunk.question is not None for chunk in truth)
    return AccuracyTable(
        reference=run.checkpoint.resolve().name,
        method="bundles executed by ONNX Runtime in float32",
        source=f"the first {len(run.compared)} of the held-out demo scenes",
        chunks=results[0].result.chunks,
        tokens=results[0].result.tokens,
        rows=tuple(_row(result) for result in results),
        notes=(
            f"Scores are those of {len(run.scenes)} held-out demo scenes of {seconds} s (seeds "
            f"{first} to {first + len(run.scenes) - 1}) with {events} events and {questions} "
            "questions.",
        ),
    )


def rows(run: Run) -> Iterator[list[str]]:
    """A row per scheme."""
    yield [
        *("weights", "K/V", "event F1", "counts", "answers", "replies changed"),
        *("mean KL", "median KL", "worst KL", "top-1", "bundle"),
    ]
    for found in measure_schemes(run):
        result = found.result
        yield [
            *found.scheme,
            *(f"{score:.4f}" for score in (result.event_f1, result.counts, result.answers)),
            f"{found.changed} of {found.narrated}",
            *(f"{kl:.1e}" for kl in (result.kl, result.median_kl, result.worst_kl)),
            f"{result.top1:.5f}",
            f"{result.size / 1e6:.1f} MB",
        ]


def _measured(run: Run, bundles: Mapping[Scheme, Path]) -> dict[Scheme, dict[str, Any]]:
    """Replies and turns of every scheme."""
    candidates = {scheme_name(scheme): bundle for scheme, bundle in bundles.items()}
    seconds = run.scenes[0].seconds
    seeds = [scene.seed for scene in run.scenes]
    batches = [tuple(seeds[i : i + MAX_STREAMS]) for i in range(0, len(seeds), MAX_STREAMS)]
    # The longest come first.
    tasks: dict[str, CompareTask | NarrateTask] = {
        f"compared-{scene.seed}": CompareTask(
            bundles["fp16", "fp16"], candidates, scene.seed, seconds
        )
        for scene in run.compared
    }
    for name, bundle in candidates.items():
        for batch in batches:
            task = NarrateTask(bundle, batch, seconds)
            tasks[f"narrated-{name}-{batch[0]}-{batch[-1]}"] = task
    found = run.find(_work, tasks)
    return {
        scheme: {
            "turns": [
                turn for scene in run.compared for turn in found[f"compared-{scene.seed}"][name]
            ],
            "replies": [
                texts
                for batch in batches
                for texts in found[f"narrated-{name}-{batch[0]}-{batch[-1]}"]
            ],
        }
        for scheme, name in zip(bundles, candidates, strict=True)
    }


def _work(task: CompareTask | NarrateTask) -> Any:
    if isinstance(task, CompareTask):
        return compare_bundles(task)
    scenes = [make_scene(seed, task.seconds) for seed in task.seeds]
    with StreamingEngine.load(
        task.bundle, "onnxruntime", max_sessions=MAX_STREAMS, threads=1, threaded=False
    ) as engine:
        return narrate_scenes(engine, scenes)


def _row(found: SchemeResult) -> AccuracyRow:
    result, (precision, cache) = found.result, found.scheme
    return AccuracyRow(
        precision=precision,
        vision_precision=precision,
        kv_precision=cache,
        scores={
            "event F1": result.event_f1,
            "counts": result.counts,
            "answers": result.answers,
        },
        kl=result.kl,
        median_kl=result.median_kl,
        worst_kl=result.worst_kl,
        top1=result.top1,
        bundle_bytes=result.size,
    )
