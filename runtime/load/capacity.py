"""How much of a machine's time streams take, and how many of them fit.

Every chunk of a stream is encoded and its prompt written once; its reply takes a step per token. A
step is shared by all replies under way, so a machine that is full runs no more decode steps than
the longest reply has tokens, each of them with every stream in it, and as many of them as there are
prompts beside a prompt: that is what is counted.
"""

from bisect import bisect_right
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
    prompts = sum(1 / shape.chunk_seconds for shape in streams)
    steps = max(shape.decode_steps / shape.chunk_seconds for shape in streams)
    return alone + _shared(prompts, steps, costs)


def streams_that_fit(shape: StreamShape, costs: WorkCosts, utilisation: float = UTILISATION) -> int:
    """How many streams of one shape take at most `utilisation` of the time; 0 if not even one."""
    own, length = _own_seconds(shape, costs), shape.chunk_seconds

    def load(streams: int) -> float:
        shared = _shared(streams / length, shape.decode_steps / length, costs)
        return streams * own / length + shared

    most = int(utilisation * length / own) + 1
    return bisect_right(range(1, most + 1), utilisation + 1e-9, key=load)


def _own_seconds(shape: StreamShape, costs: WorkCosts) -> float:
    """What a stream adds for each of its chunks; a moment at least."""
    seconds = costs.vision.seconds(shape.patches) + costs.prefill.seconds(shape.prompt_tokens)
    return max(1e-6, seconds + shape.decode_steps * costs.decode.each)


def _shared(prompts: float, steps: float, costs: WorkCosts) -> float:
    """What `steps` decode steps a second take whoever is in them, `prompts` of them, if there are
    as many, beside a prompt."""
    host = max(prompts, steps) * costs.round
    return host + steps * costs.decode.base - min(prompts, steps) * costs.saved
