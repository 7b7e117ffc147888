"""Tells errors that add up over a stream from a stream that becomes harder.

Late in a stream a quantized model may be further from the 16-bit one because its K/V rows carry
errors of long ago, or because the model is less sure of what it says there, so that the same errors
move its distributions further. Three quantized models see the same chunks:

- *old*: its rows are its own since the stream began;
- *young*: at the start of a stretch it takes over the rows of the 16-bit model, so that its errors
  are never older than the stretch; the 16-bit model, the tokens and the context are those of *old*,
  and only the age of the errors differs;
- *fresh*: in a session that was opened shortly before, beside a 16-bit model in such a session: the
  same frames without the past.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from demo.held_out import stream_of
from demo.scene import Scene
from framesink.calibration.agreement import TurnAgreement, compare_executors, replay_turn
from framesink.calibration.fake_quantization import FakeQuantization
from framesink.calibration.recorded_turns import StreamSettings, record_turns
from framesink.calibration.torch_executor import DEFAULT_PAGE_SIZE, TorchExecutor
from framesink.runtime.models.checkpoint import Checkpoint

AGES = ("old", "young", "fresh")


@dataclass(slots=True)
class AgedTurns:
    """The turns of one scheme at each age, numbered as in the whole stream: all of them for *old*,
    those of some stretches for *young*, the last ones for *fresh*."""

    old: list[TurnAgreement] = field(default_factory=list)
    young: list[TurnAgreement] = field(default_factory=list)
    fresh: list[TurnAgreement] = field(default_factory=list)


def measure_ageing(
    checkpoint: Checkpoint,
    schemes: Mapping[str, FakeQuantization],
    settings: StreamSettings,
    scene: Scene,
    *,
    stretches: Sequence[range],
    opened: int,
) -> dict[str, AgedTurns]:
    """The turns of each scheme over a scene, simulated in torch.

    `stretches` are the chunks that *young* sees, `opened` is the chunk at which *fresh* begins.
    """
    pages = settings.num_pages(DEFAULT_PAGE_SIZE)

    def executor(numerics: FakeQuantization | None = None) -> TorchExecutor:
        return TorchExecutor(checkpoint, num_pages=pages, numerics=numerics)

    reference = executor()
    old = {name: executor(numerics) for name, numerics in schemes.items()}
    young = {name: executor(numerics) for name, numerics in schemes.items()}
    found = {name: AgedTurns() for name in schemes}
    chunks, questions = stream_of(scene)
    for turn in record_turns(reference, settings, chunks, questions=questions):
        inside = [stretch for stretch in stretches if turn.chunk in stretch]
        for name, turns in found.items():
            turns.old.append(replay_turn(turn, old[name]))
            if not inside:
                continue
            if turn.chunk == inside[0].start:
                # The turn's own rows come with it and are overwritten before they are read.
                young[name].take_over(reference)
            turns.young.append(replay_turn(turn, young[name]))
    late = {chunk - opened: text for chunk, text in questions.items() if chunk >= opened}
    rest = islice(stream_of(scene)[0], opened, None)
    for name, agreed in compare_executors(reference, old, settings, rest, questions=late).items():
        found[name].fresh = [
            TurnAgreement(opened + turn.chunk, turn.kl, turn.same, turn.entropy) for turn in agreed
        ]
    return found
