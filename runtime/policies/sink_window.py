"""StreamingVLM's policy: a text sink, a window of recent text, a window of recent vision.

Source: arXiv 2510.09608; mit-han-lab/streaming-vlm `streaming_vlm/inference/inference.py`
(`process_past_kv`). Its intent is built where its code differs from it: exactly `recent_text`
tokens are kept, a reply cut short by the token limit keeps its last word, and windows in seconds
are counted in chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from framesink.runtime.errors import OptionError
from framesink.runtime.kv.lane import pages_of_run
from framesink.runtime.kv.span import PREFIX_TURN, Span, SpanKind, SpanPart
from framesink.runtime.policies.base import (
    MIN_TURNS,
    TurnProfile,
    is_previous_words,
    require_turns,
    turns_in,
)


@dataclass(frozen=True, slots=True)
class SinkWindow:
    """Keep the first `sink_text` and the last `recent_text` tokens of what was said, the last
    `vision_seconds` of video, and the last `reply_turns` turns' replies in place, the turn about
    to begin counted in both windows.

    Raises OptionError for fewer than 2 reply turns or negative sizes; for less than one vision
    turn it is raised where the length of a chunk is known.
    """

    sink_text: int = 512
    recent_text: int = 512
    vision_seconds: float = 16.0
    reply_turns: int = 16

    def __post_init__(self) -> None:
        require_turns(self.reply_turns, MIN_TURNS, f"reply_turns={self.reply_turns}")
        if self.sink_text < 0 or self.recent_text < 0:
            raise OptionError(
                f"sink_text={self.sink_text} and recent_text={self.recent_text} count tokens and "
                "cannot be negative."
            )

    def select(self, spans: Sequence[Span], turn: int, profile: TurnProfile) -> list[Span]:
        """See Policy."""
        last_old_reply = turn - self.reply_turns
        last_old_vision = turn - self.vision_turns(profile)
        prefix: list[Span] = []
        words: list[Span] = []
        close: list[Span] = []
        turns: list[Span] = []
        for span in spans:
            if is_previous_words(span):
                words.append(span)
            elif span.turn == PREFIX_TURN:
                after_words = span.kind is SpanKind.PREVIOUS_TEXT and span.part is SpanPart.CLOSE
                (close if after_words else prefix).append(span)
            elif span.kind is SpanKind.REPLY and span.part is SpanPart.BODY:
                if span.turn > last_old_reply:
                    turns.append(span)
                else:
                    words.append(span.moved(SpanKind.PREVIOUS_TEXT, SpanPart.BODY, PREFIX_TURN))
            elif span.turn > _last_old(span, last_old_reply, last_old_vision):
                turns.append(span)
        return [*prefix, *self._cut(words), *close, *turns]

    def _cut(self, words: list[Span]) -> list[Span]:
        """Leave the middle out, so that the sink and the recent tokens stay."""
        total = sum(len(span) for span in words)
        sink_end, recent_start = self.sink_text, total - self.recent_text
        if recent_start <= sink_end:
            return words
        kept = []
        start = 0
        for span in words:
            stop = start + len(span)
            if stop <= sink_end or start >= recent_start:
                kept.append(span)
            else:
                if start < sink_end:
                    kept.append(span.cut(0, sink_end - start))
                if stop > recent_start:
                    kept.append(span.cut(recent_start - start, len(span)))
            start = stop
        return kept

    def vision_turns(self, profile: TurnProfile) -> int:
        """Chunks in the vision window. Raises OptionError if there is none."""
        setting = (
            f"vision_seconds={self.vision_seconds:g} with chunks of {profile.chunk_seconds:g} s"
        )
        return require_turns(turns_in(self.vision_seconds, profile), 1, setting)

    def max_rows(self, profile: TurnProfile) -> int:
        """See Policy."""
        text, vision, frame = self._lane_rows(profile)
        return self.sink_text + text + vision + frame

    def max_pages(self, profile: TurnProfile) -> int:
        """See Policy: the sink's rows begin a page, the other rows are runs of their lanes."""
        size = profile.page_size
        runs = self._lane_rows(profile)
        return -(-self.sink_text // size) + sum(pages_of_run(rows, size) for rows in runs)

    def _lane_rows(self, profile: TurnProfile) -> tuple[int, int, int]:
        """Most rows of the text lane after the sink, of the vision lane and of the frame lane."""
        vision_turns = self.vision_turns(profile)
        turns = max(vision_turns, self.reply_turns)
        return (
            self.recent_text + self.reply_turns * profile.reply_rows,
            vision_turns * profile.vision_rows,
            turns * profile.frame_rows + profile.question_rows,
        )


def _last_old(span: Span, last_old_reply: int, last_old_vision: int) -> int:
    """The last turn whose spans of this kind and part are too old to stay."""
    if span.kind is SpanKind.VISION:
        return last_old_vision
    if span.kind is SpanKind.REPLY or span.part is SpanPart.TIME:
        return last_old_reply
    return min(last_old_reply, last_old_vision)
