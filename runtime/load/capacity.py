"""How much of a machine's time streams take, and how many of them fit.

Every chunk of a stream is encoded and its prompt written once; its reply takes a step per token. A
step is shared by all replies under way, so a machine that is full runs no more steps than the
longest reply has tokens, and each of them with every stream in it: that is what is counted.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from framesink.runtime.load.costs import WorkCosts

# Share of the time that streams may take together. The rest is for chunks that arrive at once, for
# longer contexts and for whatever else runs on the machine.
UTILISATION = 0.85


@dataclass(frozen=True, slots=True)
class StreamShape:
    """What a stream asks for with every chunk of `chunk_seconds`: ViT `patches`, `prompt_tokens` to
    write, and a reply of at most `new_tokens`."""

    chunk_seconds: float
    patches: int
    prompt_tokens: int
    new_tokens: int

    @property
    def decode_steps(self) -> int:
        """Steps of its reply: the first token comes with the prompt."""
        return self.new_tokens - 1


def predicted_load(streams: Collection[StreamShape], costs: WorkCosts) -> float:
    """Share of the time that `streams` take together; above 1 they fall behind."""
    if not streams:
        return 0.0
    alone = sum(_own_seconds(shape, costs) / shape.chunk_seconds for shape in streams)
    steps = max(shape.decode_steps / shape.chunk_seconds for shape in streams)
    return alone + steps * (costs.decode.base + costs.round)


def streams_that_fit(shape: StreamShape, costs: WorkCosts, utilisation: float = UTILISATION) -> int:
    """How many streams of one shape take at most `utilisation` of the time; 0 if not even one."""
    shared = shape.decode_steps * (costs.decode.base + costs.round)
    left = utilisation * shape.chunk_seconds - shared
    return max(0, math.floor(left / _own_seconds(shape, costs) + 1e-9))


def _own_seconds(shape: StreamShape, costs: WorkCosts) -> float:
    """What a stream adds for each of its chunks; a moment at least."""
    seconds = costs.vision.seconds(shape.patches) + costs.prefill.seconds(shape.prompt_tokens)
    return max(1e-9, seconds + shape.decode_steps * costs.decode.each)
