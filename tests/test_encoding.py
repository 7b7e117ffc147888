"""Which chunks go through the vision encoder together, over the fake executor."""

from collections.abc import Sequence

import numpy as np
import pytest
from fake.engine import PREPROCESS, finals, make_engine, make_frames, make_protocol
from fake.executor import FakeExecutor

from framesink.runtime.arrays import Float32Array, UInt8Array
from framesink.runtime.events import EventKind
from framesink.runtime.preprocess import Grid, frames_to_patches

SIZES = [(28, 28), (28, 56), (28, 28), (40, 70), (28, 28)]


class FramesExecutor(FakeExecutor):
    """Takes frames of any size, and raises for those of one colour."""

    def __init__(self) -> None:
        super().__init__(make_protocol(), num_pages=2048, page_size=16)
        self.calls: list[list[tuple[int, ...]]] = []

    def hold_frames(self, frames: UInt8Array) -> UInt8Array:
        """See FrameEncoder."""
        return frames.copy()

    def encode_frames(self, chunks: Sequence[UInt8Array], grid: Grid) -> list[Float32Array]:
        """See FrameEncoder."""
        self.calls.append([frames.shape[1:3] for frames in chunks])
        if not all(frames.any() for frames in chunks):
            raise RuntimeError("black frames")
        found = []
        for frames in chunks:
            patches, own = frames_to_patches(frames, PREPROCESS)
            assert own == grid
            found.append(super().encode_vision(patches, grid))
        return found


def test_chunks_of_one_shape_go_together_and_say_what_they_say_alone() -> None:
    expected = []
    with make_engine() as engine:
        for number, size in enumerate(SIZES):
            session = engine.open_session()
            session.push(_frames(number, size))
            expected += finals(list(session))
    executor = FramesExecutor()
    with make_engine(executor=executor) as engine:
        sessions = [engine.open_session() for _ in SIZES]
        for number, (session, size) in enumerate(zip(sessions, SIZES, strict=True)):
            frames = _frames(number, size)
            session.push(frames)
            frames[:] = 0  # the caller may use the array again
        engine.run_until_idle()
        assert [finals(list(session))[0] for session in sessions] == expected
        assert engine.stats().encoded_chunks == len(SIZES)
    assert all(len(set(shapes)) == 1 for shapes in executor.calls)
    assert sorted(len(shapes) for shapes in executor.calls) == [1, 1, 3]


def test_frames_too_large_to_be_kept_are_resized_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framesink.runtime.session.LARGEST_HELD", 2 * 60 * 90 * 3)
    said = []
    for executor in (FakeExecutor(make_protocol(), num_pages=2048, page_size=16), FramesExecutor()):
        with make_engine(executor=executor) as engine:
            for size in ((60, 90), (61, 91)):
                session = engine.open_session()
                session.push(_frames(5, size))
                said += finals(list(session))
    assert isinstance(executor, FramesExecutor)
    assert executor.calls == [[(60, 90)], [(56, 84)]]
    assert said[:2] == said[2:]


def test_one_of_several_that_cannot_be_encoded_ends_alone() -> None:
    executor = FramesExecutor()
    with make_engine(executor=executor) as engine:
        sessions = [engine.open_session() for _ in range(3)]
        for number, session in enumerate(sessions):
            session.push(_frames(number, (28, 28)) * (number != 1))
        engine.run_until_idle()
        kinds = [[event.kind for event in session][-1] for session in sessions]
        assert [kind is EventKind.ERROR for kind in kinds] == [False, True, False]
        engine.check_integrity()
    assert [len(shapes) for shapes in executor.calls] == [3, 1, 1, 1]


def _frames(number: int, size: tuple[int, int]) -> UInt8Array:
    frames = make_frames(number, height=size[0], width=size[1])
    assert np.ptp(frames) > 0
    return frames
