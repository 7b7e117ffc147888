"""What a person asks `build-engines` for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import ComputeType, Precision

DEFAULT_PAGE_SIZE = 16
DEFAULT_MAX_STREAMS = 8
DEFAULT_MAX_CONTEXT = 16_384
DEFAULT_MAX_PREFILL = 1024
CALIBRATION_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """One build.

    `precision` and `vision_precision` are those of the two parts (None: as `precision`);
    `targets` are SM names or `current` (empty: what the builder does by default). `executed_type`
    is what ONNX Runtime computes in (None: chosen by size). `max_patches` None means one chunk of
    the largest frames, `max_prefill` None 1024 tokens or
    the whole context where that is shorter.
    """

    checkpoint: Path
    output: Path
    precision: Precision = "fp16"
    vision_precision: Precision | None = None
    kv_precision: Literal["fp16", "int8", "fp8"] = "fp16"
    targets: tuple[str, ...] = ()
    plans: bool = True
    force: bool = False
    calibration_videos: tuple[Path, ...] = ()
    executed_type: ComputeType | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    max_streams: int = DEFAULT_MAX_STREAMS
    max_context: int = DEFAULT_MAX_CONTEXT
    max_prefill: int | None = None
    max_patches: int | None = None

    def check_precisions(self) -> None:
        """Raises BuildError for a precision that this version does not build."""
        for option, value in (
            ("--precision", self.precision),
            ("--vision-precision", self.vision_precision),
            ("--kv-precision", self.kv_precision),
        ):
            if value in ("fp8", "int8"):
                raise BuildError(
                    f"{option} {value} is not available in this version, which builds fp16 (bf16 "
                    "where fp16 would overflow)."
                )
