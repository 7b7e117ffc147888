"""Two executors over one stream: the reference decides, the candidate follows step by step."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from framesink.calibration.agreement import Agreement, compare_executors, replay_turn
from framesink.calibration.recorded_turns import StreamSettings, record_turns
from framesink.runtime.arrays import Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import OptionError, VerificationError
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import Executor, SequenceInput
from framesink.runtime.preprocess import Grid
from framesink.runtime.video.chunk import Chunk

CHUNKS = 4


class _Changed:
    """An executor whose logits are those of another, changed."""

    def __init__(
        self, executor: Executor, change: Callable[[Float32Array], Float32Array], pages: int = 0
    ) -> None:
        self.name, self.page_size = executor.name, executor.page_size
        self.num_pages = pages or executor.num_pages
        self._executor, self._change = executor, change

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        return self._executor.encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        outputs = self._executor.step(batch)
        return [None if logits is None else self._change(logits) for logits in outputs]

    def close(self) -> None:
        self._executor.close()


def _chunks() -> Iterator[Chunk]:
    random = np.random.default_rng(0)
    for second in range(CHUNKS):
        frames = random.integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
        yield Chunk(frames, second, second + 1.0, (second, second + 0.5), captured_at=0.0)


@pytest.fixture
def settings(tiny_bundle_with_pages: Callable[..., Path]) -> StreamSettings:
    return StreamSettings.from_bundle(Bundle.open(tiny_bundle_with_pages(16)))


@pytest.fixture
def make(
    tiny_bundle_with_pages: Callable[..., Path], settings: StreamSettings
) -> Callable[[], Executor]:
    bundle = Bundle.open(tiny_bundle_with_pages(16))
    pages = settings.num_pages(bundle.manifest.page_size)
    return lambda: create_executor(bundle, num_pages=pages)[0]


def test_an_executor_agrees_with_its_like(
    make: Callable[[], Executor], settings: StreamSettings
) -> None:
    found = compare_executors(
        make(), {"same": make()}, settings, _chunks(), questions={2: "What is it?"}
    )
    turns = found["same"]
    assert [turn.chunk for turn in turns] == list(range(CHUNKS))
    agreement = Agreement.of(turns)
    assert (agreement.kl, agreement.worst_kl, agreement.top1) == (0.0, 0.0, 1.0)
    assert agreement.tokens == sum(len(turn.kl) for turn in turns) >= CHUNKS


def test_a_candidate_never_decides_what_is_said(
    make: Callable[[], Executor], settings: StreamSettings
) -> None:
    """One that would say the opposite is still asked for the reference's tokens."""
    plain = compare_executors(make(), {"": make()}, settings, _chunks())[""]
    opposite = _Changed(make(), lambda logits: -logits)
    found = compare_executors(make(), {"": opposite}, settings, _chunks())[""]
    assert [len(turn.kl) for turn in found] == [len(turn.kl) for turn in plain]
    assert Agreement.of(found).top1 == 0.0
    assert Agreement.of(found).kl > 0.1


def test_divergence_is_that_of_scipy(
    make: Callable[[], Executor], settings: StreamSettings
) -> None:
    special = pytest.importorskip("scipy.special")
    flatter = _Changed(make(), lambda logits: logits * np.float32(0.5))
    (turn, *_) = record_turns(make(), settings, _chunks())
    expected = []
    for step in turn.steps:
        if step.logits is not None:
            logits = step.logits.astype(np.float64)
            p, q = special.softmax(logits), special.softmax(logits * 0.5)
            expected.append(special.rel_entr(p, q).sum())
    found = replay_turn(turn, flatter)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-4)
    assert all(found.same)


def test_recorded_vision_embeddings_can_be_used_again(
    make: Callable[[], Executor], settings: StreamSettings
) -> None:
    blind = make()
    blind.encode_vision = None  # type: ignore[method-assign, assignment]
    for turn in record_turns(make(), settings, _chunks()):
        assert max(replay_turn(turn, blind, encode_vision=False).kl) == 0.0


def test_pages_that_do_not_match_are_refused(
    make: Callable[[], Executor], settings: StreamSettings
) -> None:
    small = _Changed(make(), lambda logits: logits, pages=3)
    with pytest.raises(OptionError, match="small has 3 pages of 16 rows"):
        compare_executors(make(), {"small": small}, settings, _chunks())


def test_logits_that_are_not_finite_are_refused(
    make: Callable[[], Executor], settings: StreamSettings
) -> None:
    broken = _Changed(make(), lambda logits: logits * np.float32(np.nan))
    with pytest.raises(VerificationError, match="at chunk 0 hold NaN"):
        compare_executors(make(), {"": broken}, settings, _chunks())


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(VerificationError, match="No token was compared"):
        Agreement.of([])
