"""A recorded turn of the engine against the dense reference's, with a readable difference."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.dense_streaming import DenseStream, TurnRecord
from reference.positions import Position
from reference.recording import RecordedSequence
from reference.tiny_tokenizer import SPECIAL_TOKENS

SHOWN = 12


def assert_same_turn(
    stream: DenseStream,
    expected: TurnRecord,
    recorded: Sequence[RecordedSequence],
    *,
    tolerance: float,
) -> float:
    """Compare every step of one turn: retained tokens, positions, logits.

    `recorded` are the engine's steps since the turn began, prefill parts included; `tolerance` is
    the largest allowed absolute difference of a logit. Returns the largest difference found.
    Raises AssertionError saying which turn, token and span differ.
    """
    steps = [step for step in recorded if step.logits is not None]
    where = f"turn {expected.turn}"
    largest = 0.0
    for index, (step, logits) in enumerate(zip(steps, expected.logits, strict=False)):
        ids = expected.prompt + expected.tokens[:index]
        last = expected.prompt_positions[-1][0]
        said = [(last + 1 + place,) * 3 for place in range(index)]
        assert_same_context(
            stream, ids, [*expected.prompt_positions, *said], step, f"{where}, token {index}"
        )
        assert step.logits is not None
        difference = float(np.abs(step.logits - logits).max())
        largest = max(largest, difference)
        if difference > tolerance:
            raise AssertionError(
                f"{where}, token {index}: logits differ by {difference:.3g}, more than "
                f"{tolerance:.3g}, with equal tokens and positions\n"
                f"  engine    {_best(stream, step.logits)}\n"
                f"  reference {_best(stream, logits)}"
            )
    if len(steps) != len(expected.logits):
        raise AssertionError(
            f"{where}: the engine asked for logits {len(steps)} times, the reference said "
            f"{len(expected.logits)} tokens: {stream.tokenizer.decode(expected.tokens)!r}"
        )
    return largest


def assert_same_context(
    stream: DenseStream,
    ids: Sequence[int],
    positions: Sequence[Position],
    step: RecordedSequence,
    where: str,
) -> None:
    """Raise AssertionError unless the step attends to exactly `ids` at `positions`."""
    expected = Counter(zip(positions, ids, strict=True))
    if step.tokens == expected:
        return
    index_of = {position: index for index, position in enumerate(positions)}
    lines = [
        f"{where}: the engine attends to {step.tokens.total()} tokens, the reference to {len(ids)}"
    ]
    differing = [
        *(("engine", *entry) for entry in (step.tokens - expected).elements()),
        *(("reference", *entry) for entry in (expected - step.tokens).elements()),
    ]
    differing.sort(key=lambda entry: (max(entry[1]), entry[1], entry[0]))
    for side, position, token in differing[:SHOWN]:
        span = "beyond the reference's context"
        if position in index_of:
            span = stream.span_of(ids, index_of[position])
        lines.append(f"  only in the {side}, at {position}: {_name(stream, token)} ({span})")
    if len(differing) > SHOWN:
        lines.append(f"  and {len(differing) - SHOWN} more")
    in_order = sorted(step.tokens.elements(), key=lambda entry: max(entry[0]))
    lines.append(f"  engine    {_text(stream, [token for _, token in in_order])}")
    lines.append(f"  reference {_text(stream, ids)}")
    raise AssertionError("\n".join(lines))


def _name(stream: DenseStream, token: int) -> str:
    return f"{token} {_text(stream, [token])}"


def _text(stream: DenseStream, ids: Sequence[int]) -> str:
    """Text with special tokens visible and runs of video placeholders counted."""
    special = {stream.tokenizer.special(name): name for name in SPECIAL_TOKENS}
    pieces: list[str] = []
    index = 0
    while index < len(ids):
        run = 1
        while index + run < len(ids) and ids[index + run] == ids[index] == stream.video_pad:
            run += 1
        name = special.get(ids[index]) or stream.tokenizer.decode([ids[index]])
        pieces.append(f"{name}×{run}" if run > 1 else name)
        index += run
    return repr("".join(pieces))


def _best(stream: DenseStream, logits: NDArray[Any]) -> str:
    best = np.argsort(logits)[::-1][:4].tolist()
    return ", ".join(f"{_name(stream, token)}: {logits[token]:.4f}" for token in best)
