"""What a person asks `build-engines` for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from framesink.build.gate import QualityGate
from framesink.calibration.recipe import CachePrecision, LinearPrecision
from framesink.calibration.videos import DEFAULT_CHUNKS
from framesink.runtime.manifest import ComputeType

DEFAULT_PAGE_SIZE = 16
DEFAULT_MAX_STREAMS = 8
DEFAULT_MAX_CONTEXT = 16_384
DEFAULT_MAX_PREFILL = 1024
RANGE_CHUNKS = 2

ObserverName = Literal["absmax", "percentile", "mse"]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """One build.

    `precision` is that of the language model (None: fp16, or what a quantized checkpoint has),
    `head_precision` that of its projection to the vocabulary (None: fp16, or what a quantized
    checkpoint has), `vision_precision` that of the vision encoder (None: as `precision`),
    `kv_precision` that of the K/V pages. `recipe` is a file that says more exactly what is
    quantized; `observer` how ranges of activations are chosen. `gate` is what the bundle must
    reach (None: what every quantized bundle must) against `gate_checkpoint` (None: `checkpoint`);
    without `judge` nothing is measured. `compare` measures every other precision too, and puts a
    table into the bundle. `with_checkpoint` puts a checkpoint into it that TensorRT-LLM reads.

    `calibration_videos` are files or folders (empty: those in the checkpoint's own folder
    `calibration`, or else a generated scene), of which `calibration_chunks` are streamed; `device`
    is where torch does it. `targets` are SM names or `current` (empty: what the builder does by
    default). `executed_type` is what ONNX Runtime computes in (None: chosen by size). `max_patches`
    None means one chunk of the largest frames, `max_prefill` None 1024 tokens or the whole context
    where that is shorter.
    """

    checkpoint: Path
    output: Path
    precision: LinearPrecision | None = None
    head_precision: LinearPrecision | None = None
    vision_precision: LinearPrecision | None = None
    kv_precision: CachePrecision | None = None
    recipe: Path | None = None
    observer: ObserverName | None = None
    gate: QualityGate | None = None
    gate_checkpoint: Path | None = None
    judge: bool = True
    compare: bool = False
    with_checkpoint: bool = False
    targets: tuple[str, ...] = ()
    plans: bool = True
    force: bool = False
    calibration_videos: tuple[Path, ...] = ()
    calibration_chunks: int = DEFAULT_CHUNKS
    device: str = "cpu"
    executed_type: ComputeType | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    max_streams: int = DEFAULT_MAX_STREAMS
    max_context: int = DEFAULT_MAX_CONTEXT
    max_prefill: int | None = None
    max_patches: int | None = None

    @property
    def quantizes(self) -> bool:
        """Whether a 16-bit checkpoint has to be quantized for this build."""
        asked = (self.precision, self.head_precision, self.vision_precision, self.kv_precision)
        return self.recipe is not None or any(value not in (None, "fp16") for value in asked)
