"""How far one executor's next-token distributions are from another's over a live stream.

The reference decides the tokens; every candidate is asked for exactly the same steps, so that its
K/V pages hold its own rows of the same tokens, and errors that build up in the cache are seen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from framesink.calibration.recorded_turns import RecordedTurn, StreamSettings, record_turns
from framesink.runtime.arrays import Float32Array
from framesink.runtime.errors import OptionError, VerificationError
from framesink.runtime.executors.base import Executor
from framesink.runtime.video.chunk import Chunk

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement with the reference at `tokens` sampled tokens.

    `kl` is the mean Kullback-Leibler divergence KL(reference ‖ candidate) of the next-token
    distribution over the whole vocabulary, in nats; `worst_kl` the largest; `top1` the share of
    tokens whose likeliest candidate is the reference's.
    """

    tokens: int
    kl: float
    worst_kl: float
    top1: float

    @property
    def differing_tokens(self) -> int:
        """Tokens whose likeliest candidate is another than the reference's."""
        return round((1.0 - self.top1) * self.tokens)

    @classmethod
    def of(cls, turns: Iterable["TurnAgreement"]) -> "Agreement":
        """All tokens of some turns. Raises VerificationError if there are none."""
        chosen = list(turns)
        divergences = [kl for turn in chosen for kl in turn.kl]
        if not divergences:
            raise VerificationError("No token was compared; stream at least one chunk.")
        return cls(
            tokens=len(divergences),
            kl=float(np.mean(divergences)),
            worst_kl=max(divergences),
            top1=float(np.mean([same for turn in chosen for same in turn.same])),
        )


@dataclass(frozen=True, slots=True)
class TurnAgreement:
    """Per sampled token of one chunk's turn: the divergence in nats, whether the likeliest token is
    the same, and the entropy of the reference's distribution in nats: how unsure it was itself."""

    chunk: int
    kl: tuple[float, ...]
    same: tuple[bool, ...]
    entropy: tuple[float, ...]


def compare_executors(
    reference: Executor,
    candidates: Mapping[str, Executor],
    settings: StreamSettings,
    chunks: Iterable[Chunk],
    *,
    questions: Mapping[int, str] | None = None,
) -> dict[str, list[TurnAgreement]]:
    """Stream `chunks` through `reference`, and the same steps through every candidate.

    All of them hold at least the reference's pages, of the same size. Each chunk is compared as it
    ends, so memory does not grow with the stream. Returns one entry per chunk for each candidate;
    `Agreement.of` sums up any of them. Raises OptionError for pages that do not match,
    VerificationError if the session fails or a candidate's logits are not finite.
    """
    for name, candidate in candidates.items():
        check_pages(reference, candidate, name)
    found: dict[str, list[TurnAgreement]] = {name: [] for name in candidates}
    for turn in record_turns(reference, settings, chunks, questions=questions):
        for name, candidate in candidates.items():
            found[name].append(replay_turn(turn, candidate))
    return found


def replay_turn(
    turn: RecordedTurn, executor: Executor, *, encode_vision: bool = True
) -> TurnAgreement:
    """Run one turn's steps through `executor`, which ran all turns of the stream before it.

    Without `encode_vision` the recorded vision embeddings are used: right for an executor whose
    vision encoder is the reference's. Raises VerificationError for logits that are not finite.
    """
    embeddings = executor.encode_vision(turn.patches, turn.grid) if encode_vision else None
    embeddings = turn.embeddings if embeddings is None else embeddings
    divergences: list[float] = []
    same: list[bool] = []
    entropies: list[float] = []
    used = 0
    for step in turn.steps:
        rows = embeddings[used : used + step.vision_rows] if step.vision_rows else None
        used += step.vision_rows
        (logits,) = executor.step([step.with_vision(rows)])
        if step.logits is None or logits is None:
            continue
        if not np.isfinite(logits).all():
            raise VerificationError(
                f"The logits of {executor.name} at chunk {turn.chunk} hold NaN or infinite values."
            )
        divergences.append(divergence(step.logits, logits))
        same.append(int(step.logits.argmax()) == int(logits.argmax()))
        entropies.append(entropy(step.logits))
    return TurnAgreement(turn.chunk, tuple(divergences), tuple(same), tuple(entropies))


def divergence(reference: Float32Array, candidate: Float32Array) -> float:
    """KL(reference ‖ candidate) in nats of the distributions of two logits `[vocab]`."""
    expected, found = _log_softmax(reference), _log_softmax(candidate)
    return float(max(0.0, np.sum(np.exp(expected) * (expected - found))))


def entropy(logits: Float32Array) -> float:
    """Entropy in nats of the distribution of logits `[vocab]`: 0 where one token is certain."""
    logged = _log_softmax(logits)
    return float(max(0.0, -np.sum(np.exp(logged) * logged)))


def check_pages(reference: Executor, candidate: Executor, name: str) -> None:
    """Raises OptionError unless `candidate` has the pages that `reference` uses."""
    if candidate.page_size != reference.page_size or candidate.num_pages < reference.num_pages:
        raise OptionError(
            f"{name} has {candidate.num_pages} pages of {candidate.page_size} rows, but the "
            f"reference has {reference.num_pages} of {reference.page_size}; give both the same."
        )


def _log_softmax(logits: Float32Array) -> Float64Array:
    shifted = logits.astype(np.float64) - float(logits.max())
    logged: Float64Array = shifted - np.log(np.exp(shifted).sum())
    return logged
