"""Every precision of weights and cache, in real bundles executed by ONNX Runtime."""

from collections.abc import Iterator
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
from demo.parallel import spread
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
    found, bundles = _measured(run), run.bundles(SCHEMES)
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


def _measured(run: Run) -> dict[Scheme, dict[str, Any]]:
    """Replies and turns of every scheme; those of an earlier run are not measured again."""
    missing = [scheme for scheme in SCHEMES if not run.saved_path(scheme_name(scheme)).exists()]
    if missing:
        built = run.bundles(SCHEMES)
        reference = built["fp16", "fp16"]
        bundles = {scheme_name(scheme): built[scheme] for scheme in missing}
        seconds = run.scenes[0].seconds
        seeds = [scene.seed for scene in run.scenes]
        batches = [tuple(seeds[i : i + MAX_STREAMS]) for i in range(0, len(seeds), MAX_STREAMS)]
        compare = [
            CompareTask(reference, bundles, scene.seed, scene.seconds) for scene in run.compared
        ]
        narrate = [
            NarrateTask(bundle, batch, seconds) for bundle in bundles.values() for batch in batches
        ]
        # The longest first.
        tasks: list[CompareTask | NarrateTask] = [*compare, *narrate]
        done = spread(_work, tasks, run.processes)
        turns, replies = done[: len(compare)], done[len(compare) :]
        for number, name in enumerate(bundles):
            said = replies[number * len(batches) : (number + 1) * len(batches)]
            found = {
                "turns": [turn for scene in turns for turn in scene[name]],
                "replies": [scene for batch in said for scene in batch],
            }
            run.save(name, found)
    return {scheme: run.saved(scheme_name(scheme), dict) for scheme in SCHEMES}


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
