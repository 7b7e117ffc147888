"""Figures of a session and of the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SessionStats:
    """One session after its last turn.

    `turns` replied to; `context_tokens` retained; `pages` of its own held (shared prefixes apart);
    `evicted_tokens` so far. `last_ttft` and `last_itl` (mean) in seconds, of the last reply, `lag`
    in seconds at its end; None before there was one. `dropped_frames` so far. `reusable_tokens`,
    where contexts are sent anew with every turn, are those of the last one that begin it as they
    began the one before it. `rung` is where a live session stands on its ladder; 0 is full quality.
    """

    turns: int = 0
    context_tokens: int = 0
    pages: int = 0
    evicted_tokens: int = 0
    last_ttft: float | None = None
    last_itl: float | None = None
    lag: float | None = None
    dropped_frames: int = 0
    reusable_tokens: int | None = None
    rung: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The whole engine since it was made.

    `pages_used` of `pages_total` hold rows now, `pages_reserved` are promised to open sessions.
    `mean_batch` is sequences a step, `tokens` counts those written. Times are seconds.
    `gpu_seconds` is what a GPU worked on vision, prefill and decode and, as `busy`, on anything:
    less than their sum where it worked on two at once. It is empty where there is no GPU.
    `predicted_load` is the share of the time that the live sessions take, None while costs are
    unknown; `rungs` how many of them stand on which rung of their ladders (0 is full quality);
    `queued` how many wait to be opened, `refused` how many were refused so far.
    """

    sessions: int
    pages_used: int
    pages_reserved: int
    pages_total: int
    steps: int
    tokens: int
    encoded_chunks: int
    mean_batch: float
    mean_step_seconds: float
    last_step_seconds: float
    mean_encode_seconds: float
    gpu_seconds: Mapping[str, float] = field(default_factory=dict)
    predicted_load: float | None = None
    rungs: Mapping[int, int] = field(default_factory=dict)
    queued: int = 0
    refused: int = 0
