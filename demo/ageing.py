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
from pathlib import Path

import numpy as np

from demo.accuracy_run import executor
from demo.held_out import stream_of
from demo.scene import Scene
from framesink.calibration.agreement import TurnAgreement, compare_executors, replay_turn
from framesink.calibration.cache_scales import CACHE_FORMATS
from framesink.calibration.formats import quantize
from framesink.calibration.recorded_turns import record_turns
from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from framesink.runtime.models.quantization import CacheScheme, k_channel_scale, v_head_scale
from framesink.runtime.models.safetensors import read_header, read_tensor

AGES = ("old", "young", "fresh")


@dataclass(slots=True)
class AgedTurns:
    """The turns of one bundle at each age, numbered as in the whole stream: all of them for *old*,
    those of some stretches for *young*, the last ones for *fresh*."""

    old: list[TurnAgreement] = field(default_factory=list)
    young: list[TurnAgreement] = field(default_factory=list)
    fresh: list[TurnAgreement] = field(default_factory=list)


def measure_ageing(
    reference: Path,
    bundles: Mapping[str, Path],
    scene: Scene,
    *,
    stretches: Sequence[range],
    opened: int,
) -> dict[str, AgedTurns]:
    """The turns of each bundle over a scene, against the 16-bit bundle `reference`.

    `stretches` are the chunks that *young* sees, `opened` is the chunk at which *fresh* begins.
    """
    plain, settings = executor(reference)
    old = {name: executor(path)[0] for name, path in bundles.items()}
    young = {name: (executor(path)[0], page_scales(path)) for name, path in bundles.items()}
    found = {name: AgedTurns() for name in bundles}
    chunks, questions = stream_of(scene)
    for turn in record_turns(plain, settings, chunks, questions=questions):
        inside = [stretch for stretch in stretches if turn.chunk in stretch]
        for name, turns in found.items():
            turns.old.append(replay_turn(turn, old[name]))
            if not inside:
                continue
            candidate, scales = young[name]
            if turn.chunk == inside[0].start:
                # The turn's own rows come with it and are overwritten before they are read.
                take_over(candidate, plain, scales)
            turns.young.append(replay_turn(turn, candidate))
    late = {chunk - opened: text for chunk, text in questions.items() if chunk >= opened}
    rest = islice(stream_of(scene)[0], opened, None)
    for name, agreed in compare_executors(plain, old, settings, rest, questions=late).items():
        found[name].fresh = [
            TurnAgreement(opened + turn.chunk, turn.kl, turn.same, turn.entropy) for turn in agreed
        ]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PageScales:
    """How pages of a bundle are stored: the scheme, and the scales of each layer's K and V by graph
    input, float32 `[1, Hkv, 1, D]` and `[1, Hkv, 1, 1]`; none for 16-bit pages."""

    scheme: CacheScheme
    scales: Mapping[str, Float32Array]

    def stored(self, name: str, rows: AnyArray) -> AnyArray:
        """The pages that hold what 16-bit pages `rows` do."""
        if self.scheme is CacheScheme.UNQUANTIZED:
            return rows
        codes = quantize(rows.astype(np.float32), self.scales[name], CACHE_FORMATS[self.scheme])
        return codes.view(np.int8)


def page_scales(directory: Path) -> PageScales:
    """How a bundle stores its pages."""
    bundle = Bundle.open(directory)
    text, precision = bundle.manifest.model.text, bundle.manifest.cache_precision
    if precision not in (CacheScheme.INT8, CacheScheme.FP8):
        return PageScales(CacheScheme.UNQUANTIZED, {})
    tensors = {
        name: info
        for file in bundle.manifest.weights
        for name, info in read_header(bundle.path(file)).items()
    }
    scales = {}
    for index in range(text.num_hidden_layers):
        for kind, name in (("k", k_channel_scale(index)), ("v", v_head_scale(index))):
            scale = np.asarray(read_tensor(tensors[name]), np.float32)
            scales[f"{kind}_pages.{index}"] = scale.reshape(1, text.num_key_value_heads, 1, -1)
    return PageScales(CacheScheme(precision), scales)


def take_over(
    candidate: OnnxRuntimeExecutor, reference: OnnxRuntimeExecutor, scales: PageScales
) -> None:
    """Let `candidate` hold the K/V rows of `reference`, a 16-bit bundle, as its pages store them:
    whatever errors its own rows had are gone, those of storing remain."""
    for name, rows in reference.pages.items():
        candidate.pages[name][...] = scales.stored(name, rows)
