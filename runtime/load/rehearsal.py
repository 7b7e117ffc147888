"""A few turns at start-up, so that costs are known before the first stream comes."""

import time
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from framesink.runtime.arrays import UInt8Array
from framesink.runtime.errors import CapacityError
from framesink.runtime.events import EventKind
from framesink.runtime.load.costs import CostMeter
from framesink.runtime.load.declared import largest_chunk
from framesink.runtime.policies import FullAttention, Policy
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session import Session
from framesink.runtime.session_plan import SessionPlan

# Sessions that share a step, so that what a further one costs is seen.
LEAST_SESSIONS, MOST_SESSIONS = 2, 4
# Turns that are measured, alone and together; before them comes one in which executors prepare what
# they need.
TURNS = 3
REPLY_TOKENS = 8
LIKELIEST = SamplingParams()
# Every token is about as likely as any other. Choosing so takes longer, but replies do not end.
ANY_TOKEN = SamplingParams(temperature=100.0, seed=0)
# What words said before are made of.
_FILLER = "and "
_SAMPLE = 64


class OpenSession(Protocol):
    """How a session of the engine is opened."""

    def __call__(
        self,
        policy: Policy,
        *,
        sampling: SamplingParams,
        max_new_tokens: int,
        max_pending_chunks: int,
        max_patches: int,
        previous_text: str,
    ) -> Session:
        """See `StreamingEngine.open_session`."""
        ...


def rehearse(
    open_session: OpenSession,
    meter: CostMeter,
    plan: SessionPlan,
    preprocess: PreprocessConfig,
    protocol: ChatProtocol,
    *,
    seconds: float,
) -> None:
    """Hold sessions of black frames for about `seconds`, alone and together, and end them.

    Their contexts are as long as those of sessions of `plan`, of words where these have vision.
    Filling them takes longest: there are more than two only within half of `seconds`.
    Where the likeliest reply to black frames is a short one, further sessions say anything.
    `meter` then knows the costs, unless there is no room for a session, or the model says nothing.
    """
    rows, columns, groups = largest_chunk(plan, preprocess)
    side = preprocess.patch_size * preprocess.merge_size
    count = groups * preprocess.temporal_patch_size
    frames = np.zeros((count, rows * side, columns * side, 3), np.uint8)
    words = _words(plan, protocol)
    with ExitStack() as stack:
        sessions: list[Session] = []
        sampling = LIKELIEST
        begun = time.monotonic()
        while len(sessions) < LEAST_SESSIONS or (
            len(sessions) < MOST_SESSIONS and time.monotonic() - begun < seconds / 2
        ):
            try:
                session = open_session(
                    FullAttention(),
                    sampling=sampling,
                    max_new_tokens=min(REPLY_TOKENS, plan.max_new_tokens),
                    max_pending_chunks=TURNS,
                    max_patches=plan.max_patches,
                    previous_text=words,
                )
            except CapacityError:
                break
            sessions.append(stack.enter_context(session))
            if _turns([session], frames, 1) < REPLY_TOKENS:
                sampling = ANY_TOKEN
            if len(sessions) == 1:  # whose first turn prepares what all need
                begun = time.monotonic()
        meter.reset()
        _turns(sessions[:1], frames, TURNS)
        _turns(sessions, frames, TURNS)


def _words(plan: SessionPlan, protocol: ChatProtocol) -> str:
    """Text as long as the context that a session of `plan` has, less the turns of a rehearsal."""
    profile = plan.profile
    turn = profile.vision_rows + profile.frame_rows + profile.reply_rows
    used = (2 * TURNS + 2) * turn
    rows = min(
        plan.policy.max_rows(profile) - TURNS * turn,
        profile.context_pages * profile.page_size - profile.question_rows - used,
    )
    tokens = len(protocol.previous_words(_FILLER * _SAMPLE)) / _SAMPLE
    return _FILLER * max(0, int(rows / tokens))


def _turns(sessions: list[Session], frames: UInt8Array, count: int) -> int:
    """So many turns of every session. All wait in their queues before the first is answered, so
    that sessions share steps however short their replies are. Returns the length of the shortest,
    at most `REPLY_TOKENS`."""
    shortest = REPLY_TOKENS
    for _ in range(count):
        for session in sessions:
            session.push(frames)
    for session in sessions:
        left = count
        for event in session:
            if event.final:
                shortest = min(shortest, len(event.tokens))
                left -= 1
            if left == 0 or event.kind is EventKind.ERROR:
                break
    return shortest
