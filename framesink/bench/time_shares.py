"""Where the time goes while live streams are held."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from framesink.runtime.covered_time import CoveredTime

# What `TimedExecutor.gpu_seconds` calls the time of any work, and that of work beside the steps.
_BUSY, _VISION = "busy", "vision"


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Parts of every second: each moment is in one of them, so that they add up to 1.

    `steps` are those in which the GPU ran a step, by kind: `prefill` (parts of prompts), `decode`,
    and `mixed` where one step has both. `vision` are those in which the vision encoder ran and no
    step did; it also runs beside steps, in `vision_beside`, which is within `steps` and slows them.
    `host` is when the GPU did nothing though a chunk waited for its reply: the host prepared a
    step, or took in a chunk. `idle` is when no chunk waited.
    """

    steps: dict[str, float]
    vision: float
    host: float
    idle: float
    vision_beside: float


def time_shares(
    before: Mapping[str, float],
    after: Mapping[str, float],
    waits: Iterable[tuple[float, float]],
    counted: tuple[float, float],
) -> TimeShares | None:
    """Of the time `counted` (begin, end), in seconds.

    `before` and `after` are the GPU's seconds at its begin and end (`TimedExecutor.gpu_seconds`),
    `waits` the times from a chunk's arrival to the end of its reply, by the same clock as
    `counted`. None where no GPU told its seconds.
    """
    if not after:
        return None
    begin, end = counted
    length = end - begin
    spent = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
    busy, vision = spent.pop(_BUSY), spent.pop(_VISION, 0.0)
    # Steps run one after another, in one stream.
    alone = min(max(0.0, busy - sum(spent.values())), vision)
    waiting = CoveredTime()
    waiting.add((max(begin, arrived), min(end, answered)) for arrived, answered in waits)
    # What the GPU tells is late by a step, so that it may seem to have been busy for longer.
    busy = min(busy, length)
    work = max(waiting.seconds, busy)
    return TimeShares(
        steps={name: seconds / length for name, seconds in sorted(spent.items())},
        vision=alone / length,
        host=(work - busy) / length,
        idle=(length - work) / length,
        vision_beside=(vision - alone) / length,
    )
