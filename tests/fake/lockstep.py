"""A session and the plain token list it must agree with, turn by turn."""

from collections.abc import Collection

import numpy as np

from fake.engine import fake_vision, finals, make_frames
from fake.token_list import TokenList
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.session import Session

SIZES = [(28, 28), (28, 56), (56, 56), (56, 84)]


def run_in_lockstep(
    engine: StreamingEngine,
    session: Session,
    theirs: TokenList,
    *,
    max_new_tokens: int,
    seed: int,
    questions: Collection[int] = (),
) -> None:
    """Twenty turns over random frames, with a question in those of `questions`: every reply and
    every context is that of the list, and no page is left when the session closes."""
    random = np.random.default_rng(seed)
    for turn in range(20):
        height, width = SIZES[random.integers(len(SIZES))]
        frames = make_frames(seed + turn, height=height, width=width)
        question = "Which one?" if turn in questions else None
        if question is not None:
            session.ask(question)
        session.push(frames)
        (reply,) = finals(list(session))
        theirs.begin_turn((turn, turn + 1.0), *fake_vision(frames), question)
        assert list(reply) == theirs.reply(max_new_tokens)
        assert session.stats().context_tokens == len(theirs.entries)
    engine.check_integrity()
    session.close()
    assert engine.stats().pages_used == 0
