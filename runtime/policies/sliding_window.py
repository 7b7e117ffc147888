"""The plain window: whole recent turns and nothing older."""

from collections.abc import Sequence
from dataclasses import dataclass

from framesink.runtime.kv.lane import pages_of_run
from framesink.runtime.kv.span import PREFIX_TURN, Span
from framesink.runtime.policies.base import (
    MIN_TURNS,
    TurnProfile,
    is_prefix,
    require_turns,
    turns_in,
)


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """Keep the turns of the last `seconds` of video, the turn about to begin among them."""

    seconds: float = 16.0

    def select(self, spans: Sequence[Span], turn: int, profile: TurnProfile) -> list[Span]:
        """See Policy."""
        # Words said before the session was opened are older than any of its turns.
        last_old = max(turn - self._turns(profile), PREFIX_TURN)
        return [span for span in spans if is_prefix(span) or span.turn > last_old]

    def max_rows(self, profile: TurnProfile) -> int:
        """See Policy."""
        return sum(self._lane_rows(profile))

    def max_pages(self, profile: TurnProfile) -> int:
        """See Policy."""
        return sum(pages_of_run(rows, profile.page_size) for rows in self._lane_rows(profile))

    def _turns(self, profile: TurnProfile) -> int:
        setting = f"seconds={self.seconds:g} with chunks of {profile.chunk_seconds:g} s"
        return require_turns(turns_in(self.seconds, profile), MIN_TURNS, setting)

    def _lane_rows(self, profile: TurnProfile) -> tuple[int, int, int]:
        """Most rows of the text, vision and frame lanes."""
        turns = self._turns(profile)
        return (
            turns * profile.reply_rows,
            turns * profile.vision_rows,
            turns * profile.frame_rows + profile.question_rows,
        )
