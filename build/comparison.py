"""What every precision would cost, simulated in torch over the checkpoint's own weights."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from framesink.build.accuracy import AccuracyRow, AccuracyTable
from framesink.build.estimate import weight_bytes
from framesink.build.footage import Footage
from framesink.calibration.agreement import Agreement, TurnAgreement, replay_turn
from framesink.calibration.fake_quantization import FakeQuantization
from framesink.calibration.observers import Observer
from framesink.calibration.recipe import CACHE_SCHEMES, LINEAR_SCHEMES, Recipe
from framesink.calibration.recorded_turns import RecordedTurn, StreamSettings, record_turns
from framesink.calibration.simulation import simulate_cache, simulate_linears
from framesink.calibration.statistics import Statistics
from framesink.calibration.taps import SwitchedNumerics
from framesink.calibration.torch_executor import DEFAULT_PAGE_SIZE, TorchExecutor
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import LinearScheme
from framesink.runtime.models.weights import model_weights

METHOD = "every choice is simulated in torch in float32, with the scales measured for it"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checkpoint, what calibration saw of it, and the video that its precisions are judged on.

    `recipe` is what is asked for; it has a row of its own where it is not among the precisions that
    are compared anyway. `observer` chooses the input ranges of FP8 layers.
    """

    checkpoint: Checkpoint
    statistics: Statistics
    settings: StreamSettings
    footage: Footage
    recipe: Recipe | None = None
    observer: Observer = Observer.ABSMAX
    device: str = "cpu"

    def measure(self, on_progress: Callable[[float], None] = lambda _: None) -> AccuracyTable:
        """Stream the video through the 16-bit model, then the same steps through every choice.

        Raises VideoError for video that cannot be read, VerificationError if nothing was said or a
        choice gives logits that are not finite, and CheckpointError where calibration saw other
        layers.
        """
        recipes = self._recipes()
        switch = SwitchedNumerics()
        executor = TorchExecutor(
            self.checkpoint,
            num_pages=self.settings.num_pages(DEFAULT_PAGE_SIZE),
            device=self.device,
            numerics=switch,
        )
        try:
            turns = list(self._record(executor))
            on_progress(1 / (len(recipes) + 1))
            rows = []
            for number, recipe in enumerate(recipes):
                switch.active = self._simulate(recipe)
                replayed = [replay_turn(turn, executor) for turn in turns]
                rows.append(self._row(recipe, replayed))
                on_progress((number + 2) / (len(recipes) + 1))
        finally:
            executor.close()
        return AccuracyTable(
            reference=self.checkpoint.directory.resolve().name,
            method=METHOD,
            source=self.footage.judged_source,
            chunks=len(turns),
            tokens=Agreement.of(replayed).tokens,
            rows=tuple(rows),
            notes=tuple(self._notes()),
        )

    def _recipes(self) -> list[Recipe]:
        """All precisions of weights with each of the K/V cache, and what is asked for."""
        recipes = [
            Recipe(language_model=precision, vision_encoder=precision, kv_cache=cache)
            for cache in CACHE_SCHEMES
            for precision in LINEAR_SCHEMES
        ]
        asked = [] if self.recipe is None or self.recipe in recipes else [self.recipe]
        return recipes + asked

    def _record(self, executor: TorchExecutor) -> Iterator[RecordedTurn]:
        seconds = self.settings.defaults.chunk_seconds
        for stream in self.footage.judged_streams(self.settings.preprocess, seconds):
            yield from record_turns(executor, self.settings, stream)

    def _simulate(self, recipe: Recipe) -> FakeQuantization:
        quantization = recipe.resolve(self.checkpoint.config)
        linears = simulate_linears(
            self.checkpoint,
            self.statistics,
            quantization,
            observer=self.observer,
            alpha=recipe.smoothquant_alpha,
        )
        return FakeQuantization(linears, simulate_cache(self.statistics, quantization.cache))

    def _notes(self) -> Iterator[str]:
        yield f"Calibrated on {self.statistics.source}."
        int4 = Recipe(language_model="int4-weight-only", vision_encoder="int4-weight-only")
        schemes = Counter(int4.resolve(self.checkpoint.config).linears.values())
        held = schemes[LinearScheme.INT8_WEIGHT_ONLY]
        if held:
            yield (
                f"Where INT4 is asked for, {held} of {schemes.total()} layers are held in INT8: "
                "their inputs are no multiple of its groups."
            )

    def _row(self, recipe: Recipe, turns: Sequence[TurnAgreement]) -> AccuracyRow:
        config = self.checkpoint.config
        quantization = recipe.resolve(config)
        agreement = Agreement.of(turns)
        language = recipe.language_model
        return AccuracyRow(
            precision=f"{language} (recipe)" if recipe.overrides else language,
            vision_precision=recipe.vision_encoder,
            kv_precision=recipe.kv_cache,
            kl=agreement.kl,
            median_kl=float(np.median([kl for turn in turns for kl in turn.kl])),
            worst_kl=agreement.worst_kl,
            top1=agreement.top1,
            weight_bytes=weight_bytes(config, model_weights(config), quantization),
        )
