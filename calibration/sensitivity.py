"""How much each layer suffers from quantization alone, and which to keep in 16-bit.

The damage of a group of linear layers is the mean KL divergence of the next-token distribution from
the 16-bit model's over streamed chunks, with that group quantized and nothing else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from framesink.calibration.agreement import Agreement, replay_turn
from framesink.calibration.fake_quantization import FakeLinear, FakeQuantization
from framesink.calibration.recipe import Recipe
from framesink.calibration.recorded_turns import RecordedTurn, StreamSettings, record_turns
from framesink.calibration.smoothquant import input_groups
from framesink.calibration.taps import SwitchedNumerics
from framesink.calibration.torch_executor import DEFAULT_PAGE_SIZE, TorchExecutor
from framesink.runtime.errors import OptionError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import LinearScheme, quantizable_linears
from framesink.runtime.video.chunk import Chunk

VISION_PREFIX = "visual."
_BITS = {
    LinearScheme.UNQUANTIZED: 16,
    LinearScheme.FP8: 8,
    LinearScheme.INT8: 8,
    LinearScheme.INT8_WEIGHT_ONLY: 8,
    LinearScheme.INT4_WEIGHT_ONLY: 4,
}


@dataclass(frozen=True, slots=True)
class GroupSensitivity:
    """The damage of quantizing `linears` alone. `extra_bytes` is what keeping their weights in
    16-bit costs."""

    linears: tuple[str, ...]
    agreement: Agreement
    extra_bytes: int

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats."""
        return self.agreement.kl


@dataclass(frozen=True, slots=True)
class SensitivityReport:
    """Groups by damage, the worst first; `together` is the agreement of the model with all of them
    quantized, over `chunks` chunks."""

    groups: tuple[GroupSensitivity, ...]
    together: Agreement
    chunks: int

    def keep_for_kl(self, budget: float) -> tuple[GroupSensitivity, ...]:
        """The groups to keep in 16-bit so that the rest stays within `budget` nats.

        Damages are taken to add up, scaled to what was measured of all together. Groups that avoid
        most damage per byte go first. Raises OptionError for a budget that is not above 0.
        """
        if not budget > 0:
            raise OptionError(f"A KL budget of {budget:g} must be above 0.")
        alone = sum(group.kl for group in self.groups)
        left, scale = self.together.kl, self.together.kl / alone if alone else 0.0
        kept: list[GroupSensitivity] = []
        for group in self._by_worth():
            if left <= budget:
                break
            kept.append(group)
            left -= group.kl * scale
        return tuple(kept)

    def keep_for_bytes(self, budget: int) -> tuple[GroupSensitivity, ...]:
        """The groups to keep in 16-bit for at most `budget` bytes more than with none kept."""
        kept: list[GroupSensitivity] = []
        for group in self._by_worth():
            if group.extra_bytes <= budget:
                kept.append(group)
                budget -= group.extra_bytes
        return tuple(kept)

    def _by_worth(self) -> list[GroupSensitivity]:
        return sorted(self.groups, key=lambda group: group.kl / group.extra_bytes, reverse=True)


def measure_sensitivity(
    checkpoint: Checkpoint,
    linears: Mapping[str, FakeLinear],
    settings: StreamSettings,
    streams: Iterable[Iterable[Chunk]],
    *,
    device: str = "cpu",
    on_progress: Callable[[float], None] = lambda _: None,
) -> SensitivityReport:
    """Rank `linears`, in groups that share their input, by what quantizing each group alone does.

    The 16-bit model runs each of `streams` once and decides the tokens. While only language layers
    are quantized its vision embeddings are used again. Raises VerificationError if nothing was
    said.
    """
    numerics = SwitchedNumerics()
    groups = [
        tuple(name for name in group.linears if name in linears)
        for group in input_groups(checkpoint.config)
    ]
    groups = [group for group in groups if group]
    executor = TorchExecutor(
        checkpoint,
        num_pages=settings.num_pages(DEFAULT_PAGE_SIZE),
        device=device,
        numerics=numerics,
    )
    try:
        turns = [turn for chunks in streams for turn in record_turns(executor, settings, chunks)]
        measured: list[GroupSensitivity] = []
        for number, names in enumerate(groups):
            on_progress(number / (len(groups) + 1))
            numerics.active = FakeQuantization({name: linears[name] for name in names})
            agreement = _replay(turns, executor, names)
            extra = sum(_extra_bytes(checkpoint, name, linears[name].scheme) for name in names)
            measured.append(GroupSensitivity(names, agreement, extra))
        numerics.active = FakeQuantization(linears)
        together = _replay(turns, executor, list(linears))
        on_progress(1.0)
    finally:
        executor.close()
    measured.sort(key=lambda group: group.kl, reverse=True)
    return SensitivityReport(tuple(measured), together, len(turns))


def keep_in_recipe(recipe: Recipe, kept: Iterable[GroupSensitivity]) -> Recipe:
    """A recipe that also keeps these groups in 16-bit."""
    names = [name for group in kept for name in group.linears]
    return recipe.model_copy(
        update={"overrides": {**recipe.overrides} | dict.fromkeys(names, "fp16")}
    )


def _replay(
    turns: Sequence[RecordedTurn], executor: TorchExecutor, linears: Sequence[str]
) -> Agreement:
    sees = any(name.startswith(VISION_PREFIX) for name in linears)
    return Agreement.of(replay_turn(turn, executor, encode_vision=sees) for turn in turns)


def _extra_bytes(checkpoint: Checkpoint, linear: str, scheme: LinearScheme) -> int:
    """What a weight takes in 16-bit more than in a scheme, scales left out."""
    rows, columns = quantizable_linears(checkpoint.config)[linear]
    return rows * columns * (_BITS[LinearScheme.UNQUANTIZED] - _BITS[scheme]) // 8
