"""Executors: where the weights and the K/V pages live."""

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import FramesinkError
from framesink.runtime.executors.base import Executor, VisionEncoder
from framesink.runtime.gpu import current_sm

AVAILABLE = ("onnxruntime",)
KNOWN = ("onnxruntime", "tensorrt", "cuda", "tensorrt_llm")


def create_executor(
    bundle: Bundle, name: str = "auto", *, num_pages: int, threads: int | None = None
) -> tuple[Executor, str]:
    """Load a bundle into an executor; also returns one sentence: which it is, and why.

    `num_pages` counts pages of the bundle's page size, the null page included. `threads` is for the
    CPU (None: one per physical core). Raises FramesinkError for a name that is unknown or not
    available, and what the executor's own loading raises.
    """
    _require_available(name)
    # Imported here: a host that runs another executor may lack this one's packages.
    from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor

    executor = OnnxRuntimeExecutor.from_bundle(bundle, num_pages=num_pages, threads=threads)
    return executor, f"onnxruntime on the CPU: {_why(name)}."


def create_vision_encoder(
    bundle: Bundle, name: str = "auto", *, threads: int | None = None
) -> VisionEncoder:
    """Load a bundle's vision encoder alone, for a process that runs no language model.

    Arguments and errors are those of `create_executor`.
    """
    _require_available(name)
    from framesink.runtime.executors.onnx_vision import OnnxVisionEncoder

    return OnnxVisionEncoder.from_bundle(bundle, threads=threads)


def _require_available(name: str) -> None:
    if name not in ("auto", *AVAILABLE):
        state = "is not part of this version" if name in KNOWN else "is unknown"
        raise FramesinkError(
            f"The executor {name[:64]!r} {state}; available are auto, {', '.join(AVAILABLE)}."
        )


def _why(name: str) -> str:
    if name != "auto":
        return "asked for by name"
    sm = current_sm()
    if sm is None:
        return "this machine has no usable NVIDIA GPU"
    return f"the GPU here ({sm}) is unused, as this version has no executor for GPUs"
