"""What an engine tells its observer, against what its executor and its sessions saw."""

from dataclasses import dataclass, field

import numpy as np
from fake.engine import make_engine, make_frames, make_protocol
from fake.executor import FakeExecutor

from framesink.runtime.engine import StreamingEngine
from framesink.runtime.observer import StepReport
from framesink.runtime.policies import SinkWindow
from framesink.runtime.video.chunk import Chunk


@dataclass
class Notes:
    """An observer that writes everything down."""

    steps: list[StepReport] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    evicted: dict[int, int] = field(default_factory=dict)
    dropped: dict[int, int] = field(default_factory=dict)

    def stepped(self, report: StepReport) -> None:
        """See EngineObserver."""
        self.steps.append(report)

    def encoded(self, patches: int, seconds: float) -> None:
        """See EngineObserver."""
        assert seconds >= 0
        self.patches.append(patches)

    def turn_began(self, session: int, *, evicted_tokens: int, dropped_frames: int) -> None:
        """See EngineObserver."""
        self.evicted[session] = self.evicted.get(session, 0) + evicted_tokens
        self.dropped[session] = self.dropped.get(session, 0) + dropped_frames


def observed_engine(notes: Notes) -> tuple[StreamingEngine, FakeExecutor]:
    executor = FakeExecutor(make_protocol(), num_pages=2048, page_size=16)
    return make_engine(executor=executor, observer=notes), executor


def test_every_step_chunk_and_turn_is_told() -> None:
    notes = Notes()
    engine, executor = observed_engine(notes)
    with engine:
        policy = SinkWindow(4, 4, 2.0, 2)
        sessions = [engine.open_session(policy) for _ in range(3)]
        sampled = 0
        for turn in range(6):
            for number, session in enumerate(sessions):
                dropped = turn if number == 1 else 0
                frames = make_frames(turn + number)
                session.push_chunk(Chunk(frames, turn, turn + 1, (turn, turn), 0.0, dropped))
            engine.run_until_idle()
            sampled += sum(len(event.tokens) for session in sessions for event in session)
        stats = engine.stats()
        assert [report.decoding + report.prefilling for report in notes.steps] == (
            executor.batch_sizes
        )
        assert len(notes.steps) == stats.steps
        assert sum(report.tokens for report in notes.steps) == stats.tokens
        assert np.isclose(
            sum(report.seconds for report in notes.steps) / stats.steps, stats.mean_step_seconds
        )
        # A decode step writes one token after the first, which comes with the prompt; the last one
        # is not written.
        decoded = sum(report.decoding for report in notes.steps)
        assert sampled - 18 - 3 * 18 <= decoded <= sampled
        assert notes.patches == [8] * 18
        for session in sessions:
            assert notes.evicted[session.number] == session.stats().evicted_tokens > 0
            assert notes.dropped[session.number] == session.stats().dropped_frames
        assert notes.dropped[sessions[1].number] == sum(range(6))
