"""No eviction: everything stays until the context is full."""

from collections.abc import Sequence
from dataclasses import dataclass

from framesink.runtime.errors import CapacityError
from framesink.runtime.kv.lane import LaneName, lane_of
from framesink.runtime.kv.span import Span
from framesink.runtime.policies.base import TurnProfile, is_prefix


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Keep every span; a turn that might not fit is refused before it begins."""

    def select(self, spans: Sequence[Span], turn: int, profile: TurnProfile) -> list[Span]:
        """See Policy. Raises CapacityError when the largest turn would not fit any more."""
        rows = {
            LaneName.TEXT: profile.reply_rows,
            LaneName.VISION: profile.vision_rows,
            LaneName.FRAME: profile.frame_rows + profile.question_rows,
        }
        for span in spans:
            if not is_prefix(span):
                rows[lane_of(span)] += len(span)
        pages = sum(-(-count // profile.page_size) for count in rows.values())
        if pages > profile.context_pages:
            raise CapacityError(
                f"The context is full after {turn} turns: another could need {pages} of "
                f"{profile.context_pages} pages of {profile.page_size} tokens, and FullAttention "
                "evicts nothing; use SinkWindow, or a bundle with a larger max_context."
            )
        return list(spans)

    def max_rows(self, profile: TurnProfile) -> int:
        """See Policy."""
        return profile.context_pages * profile.page_size

    def max_pages(self, profile: TurnProfile) -> int:
        """See Policy."""
        return profile.context_pages
