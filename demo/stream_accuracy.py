"""Agreement with 16-bit along long streams, and whether errors add up in them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from demo.accuracy_bundles import Scheme, scheme_name
from demo.accuracy_run import CompareTask, Run, compare_bundles, turns_from_json, turns_to_json
from demo.ageing import AGES, measure_ageing
from framesink.calibration.agreement import TurnAgreement

DRIFT_SCHEMES: tuple[Scheme, ...] = (("fp16", "int8"), ("fp8", "fp16"), ("fp8", "int8"))
AGEING_SCHEMES: tuple[Scheme, ...] = (("fp16", "int8"), ("fp8", "fp16"))
STRETCH = 30
# In nats: below it a token's likeliest candidate has all but a ten-thousandth of the probability.
SURE_ENTROPY = 1e-3
# Errors of different ages are compared in one stretch of three, from chunk 60 on; in the last of
# them fresh sessions are 60 chunks old.
FIRST_AGED, AGED_EVERY = 60, 90
FRESH_CHUNKS = 90


def drift_rows(run: Run) -> Iterator[list[str]]:
    """A row per stretch of the streams: how unsure 16-bit itself is, and each scheme's KL to it."""
    names = [scheme_name(scheme) for scheme in DRIFT_SCHEMES]
    yield ["chunks", "entropy", *(f"{name}: {what}" for name in names for what in _COLUMNS)]

    bundles = run.bundles([("fp16", "fp16"), *DRIFT_SCHEMES])
    candidates = {scheme_name(scheme): bundles[scheme] for scheme in DRIFT_SCHEMES}
    tasks = {
        f"drift-{scene.seed}": CompareTask(
            bundles["fp16", "fp16"], candidates, scene.seed, scene.seconds, run.event_rate
        )
        for scene in run.scenes
    }
    scenes = run.find(compare_bundles, tasks).values()
    turns = {
        name: [turn for found in scenes for turn in turns_from_json(found[name])] for name in names
    }
    for chunks in _stretches(run.scenes[0].seconds):
        inside = {name: _inside(found, chunks) for name, found in turns.items()}
        cells = [_span(chunks), f"{_entropy(inside[names[0]]):.1e}"]
        for name in names:
            cells += _cells(inside[name])
        yield cells


def ageing_rows(run: Run) -> Iterator[list[str]]:
    """A row per scheme and compared stretch: the same tokens with old and with young errors."""
    yield ["scheme", "chunks", "entropy", *(f"{age}: {what}" for age in AGES for what in _COLUMNS)]

    bundles = run.bundles([("fp16", "fp16"), *AGEING_SCHEMES])
    candidates = {scheme_name(scheme): bundles[scheme] for scheme in AGEING_SCHEMES}
    tasks = {
        f"ageing-{scene.seed}": CompareTask(
            bundles["fp16", "fp16"], candidates, scene.seed, scene.seconds, run.event_rate
        )
        for scene in run.scenes
    }
    scenes = run.find(_age, tasks).values()
    stretches = _aged(run.scenes[0].seconds)
    for name in map(scheme_name, AGEING_SCHEMES):
        turns = {
            age: [turn for found in scenes for turn in turns_from_json(found[name][age])]
            for age in AGES
        }
        for chunks in stretches:
            inside = {age: _inside(found, chunks) for age, found in turns.items()}
            cells = [name, _span(chunks), f"{_entropy(inside['old']):.1e}"]
            for age in AGES:
                cells += _cells(inside[age] if age != "fresh" or chunks is stretches[-1] else [])
            yield cells


_COLUMNS = ("mean KL", "median", "where sure", "top-1")


def _cells(turns: Sequence[TurnAgreement]) -> list[str]:
    """Mean and median KL, the mean over the tokens that 16-bit is sure of, and top-1."""
    divergences = np.array([kl for turn in turns for kl in turn.kl])
    if not divergences.size:
        return ["–"] * len(_COLUMNS)
    sure = np.array([value for turn in turns for value in turn.entropy]) < SURE_ENTROPY
    same = float(np.mean([same for turn in turns for same in turn.same]))
    found = (divergences.mean(), np.median(divergences), divergences[sure].mean())
    return [*(f"{value:.1e}" for value in found), f"{same:.4f}"]


def _entropy(turns: Sequence[TurnAgreement]) -> float:
    return float(np.mean([value for turn in turns for value in turn.entropy]))


def _stretches(seconds: int) -> list[range]:
    return [range(start, min(start + STRETCH, seconds)) for start in range(0, seconds, STRETCH)]


def _aged(seconds: int) -> list[range]:
    return [range(start, start + STRETCH) for start in range(FIRST_AGED, seconds, AGED_EVERY)]


def _span(chunks: range) -> str:
    return f"{chunks.start} to {chunks.stop - 1}"


def _inside(turns: Sequence[TurnAgreement], chunks: range) -> list[TurnAgreement]:
    return [turn for turn in turns if turn.chunk in chunks]


def _age(task: CompareTask) -> dict[str, Any]:
    found = measure_ageing(
        task.reference,
        task.candidates,
        task.scene,
        stretches=_aged(task.seconds),
        opened=task.seconds - FRESH_CHUNKS,
    )
    return {
        name: {age: turns_to_json(getattr(turns, age)) for age in AGES}
        for name, turns in found.items()
    }
