"""What a session will need, worked out before it is opened: prefix, worst-case turn, pages."""

from dataclasses import dataclass, replace
from typing import Literal

from framesink.runtime.errors import CapacityError, OptionError
from framesink.runtime.kv.positions import text_span
from framesink.runtime.kv.span import PREFIX_TURN, Span, SpanKind, SpanPart
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.policies import Policy, SinkWindow, TurnProfile
from framesink.runtime.policies.base import is_previous_words
from framesink.runtime.prefix import prefix_pages, prefix_spans
from framesink.runtime.protocol import ChatProtocol

QueryPlacement = Literal["pinned", "first_turn"]

QUESTION_TOKENS = 512
LAST_SECOND = 99_999_999.9  # three years of video
# Sessions that are not live give way to live ones for so long, in seconds.
OFFLINE_LEEWAY = 10.0
VISION_MARKS = 2  # the start and the end token of a vision block


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """A session's prefix and the most it will ever hold.

    `pages` are those of its own, the prefix's apart; `max_patches` are those of a chunk;
    `first_query` are the tokens of a query placed
    in the first turn, `previous_words` those of earlier words that the policy keeps. Replies are
    due `leeway` seconds later than those of a live session would be.
    """

    policy: Policy
    profile: TurnProfile
    prefix: tuple[Span, ...]
    pages: int
    max_patches: int
    first_query: tuple[int, ...]
    previous_words: tuple[int, ...]
    max_new_tokens: int
    leeway: float = 0.0


def default_policy(defaults: StreamingDefaults) -> SinkWindow:
    """The policy a bundle was made for."""
    return SinkWindow(
        sink_text=defaults.sink_text,
        recent_text=defaults.recent_text,
        vision_seconds=defaults.vision_seconds,
        reply_turns=defaults.reply_turns,
    )


@dataclass(frozen=True, slots=True)
class SessionPlanner:
    """Plans the sessions of an engine; what is left out is the bundle's default. `page_size` is in
    tokens."""

    protocol: ChatProtocol
    model: ModelConfig
    limits: Limits
    defaults: StreamingDefaults
    page_size: int

    def plan(
        self,
        policy: Policy | None = None,
        query: str | None = None,
        placement: QueryPlacement = "pinned",
        *,
        chunk_seconds: float | None = None,
        max_new_tokens: int | None = None,
        max_patches: int | None = None,
        previous_text: str = "",
    ) -> SessionPlan:
        """The plan of a session; an empty `query` is none. Raises what `plan_session` raises."""
        defaults = self.defaults
        query = defaults.query if query is None else query
        return plan_session(
            policy or default_policy(defaults),
            query or None,
            placement,
            protocol=self.protocol,
            model=self.model,
            limits=self.limits,
            page_size=self.page_size,
            chunk_seconds=defaults.chunk_seconds if chunk_seconds is None else chunk_seconds,
            max_new_tokens=defaults.max_new_tokens if max_new_tokens is None else max_new_tokens,
            max_patches=self.limits.max_patches if max_patches is None else max_patches,
            previous_text=previous_text,
        )


def plan_session(
    policy: Policy,
    query: str | None,
    placement: QueryPlacement,
    *,
    protocol: ChatProtocol,
    model: ModelConfig,
    limits: Limits,
    page_size: int,
    chunk_seconds: float,
    max_new_tokens: int,
    max_patches: int,
    previous_text: str = "",
) -> SessionPlan:
    """The plan of a session. `previous_text` was said before it was opened.

    Raises OptionError for settings that make no sense, CapacityError for a query longer than the
    context or a policy whose worst case does not fit it, with the figures.
    """
    if max_new_tokens < 1 or chunk_seconds <= 0:
        raise OptionError(
            f"max_new_tokens={max_new_tokens} and chunk_seconds={chunk_seconds:g} must be above 0."
        )
    if not 0 < max_patches <= limits.max_patches:
        raise OptionError(
            f"max_patches={max_patches} must be between 1 and the {limits.max_patches} patches "
            "the bundle was built for."
        )
    pinned = query if placement == "pinned" else None
    in_turn = tuple(protocol.question(query)) if query and placement == "first_turn" else ()
    spans = tuple(prefix_spans(protocol, pinned))
    total = -(-limits.max_context // page_size)
    left = total - prefix_pages(spans, page_size)
    if left <= 0 or len(in_turn) >= limits.max_context:
        raise CapacityError(
            f"The query of {len(protocol.question(query or ''))} tokens does not fit the context "
            f"of {limits.max_context} tokens; shorten it."
        )
    profile = TurnProfile(
        chunk_seconds=chunk_seconds,
        vision_rows=max_patches // model.vision.merge_unit + VISION_MARKS,
        frame_rows=_frame_rows(protocol),
        reply_rows=max_new_tokens,
        question_rows=len(in_turn) + min(QUESTION_TOKENS, left * page_size // 4),
        context_pages=left,
        page_size=page_size,
    )
    profile = _fit_questions(policy, profile, len(in_turn))
    words = _kept_words(policy, profile, spans, protocol.previous_words(previous_text))
    pages = policy.max_pages(profile)
    return SessionPlan(policy, profile, spans, pages, max_patches, in_turn, words, max_new_tokens)


def _kept_words(
    policy: Policy, profile: TurnProfile, prefix: tuple[Span, ...], words: list[int]
) -> tuple[int, ...]:
    """What the policy keeps of `words` in `previous text`.

    Raises CapacityError if it cannot make room for the first turn beside them.
    """
    spans = list(prefix)
    if words:
        body = text_span(SpanKind.PREVIOUS_TEXT, SpanPart.BODY, PREFIX_TURN, words)
        spans.insert(-1, body)
    kept = filter(is_previous_words, policy.select(spans, 0, profile))
    return tuple(int(token) for span in kept for token in span.tokens)


def _fit_questions(policy: Policy, profile: TurnProfile, least: int) -> TurnProfile:
    """Lower the room for questions, to `least` tokens if need be, until the worst case fits."""
    excess = policy.max_pages(profile) - profile.context_pages
    rows = max(least, profile.question_rows - max(0, excess) * profile.page_size)
    fitted = replace(profile, question_rows=rows)
    pages = policy.max_pages(fitted)
    if pages > profile.context_pages:
        raise CapacityError(
            f"{policy} can need {policy.max_rows(fitted)} tokens in {pages} pages of "
            f"{profile.page_size} for chunks of {profile.chunk_seconds:g} s and "
            f"{profile.vision_rows} vision tokens, but beside the prefix the bundle's context has "
            f"{profile.context_pages} pages; use a smaller policy, or build with a larger "
            "max_context."
        )
    return fitted


def _frame_rows(protocol: ChatProtocol) -> int:
    """Most tokens that wrap one turn; a byte of the time text is at most one token."""
    time_bytes = len(f"Time={LAST_SECOND:.1f}-{LAST_SECOND:.1f}s")
    headers = len(protocol.user_open) + len(protocol.reply_open)
    return headers + time_bytes + len(protocol.reply_closing) + 2 * len(protocol.turn_close)
