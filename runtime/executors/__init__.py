"""Executors: where the weights and the K/V pages live."""

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import FramesinkError
from framesink.runtime.executors.base import Executor, VisionEncoder
from framesink.runtime.executors.cuda.support import why_not_cuda
from framesink.runtime.executors.tensorrt_llm.options import TensorRTLLMOptions
from framesink.runtime.prompting.executor import PromptExecutor

AVAILABLE = ("onnxruntime", "cuda", "tensorrt_llm")
KNOWN = ("onnxruntime", "tensorrt", "cuda", "tensorrt_llm")


def create_executor(
    bundle: Bundle, name: str = "auto", *, num_pages: int, threads: int | None = None
) -> tuple[Executor, str]:
    """Load a bundle into an executor; also returns one sentence: which it is, and why.

    "auto" is `cuda` wherever it can run. `num_pages` counts pages of the bundle's page size, the
    null page included. `threads` is for the CPU (None: one per physical core). Raises
    FramesinkError for a name that is unknown or not available here, or of an executor without pages
    (see `create_prompt_executor`), and what the executor's own loading raises.
    """
    _require_available(name)
    if name == "tensorrt_llm":
        raise FramesinkError(
            "The tensorrt_llm executor takes whole prompts and no steps, so it cannot be used here."
        )
    obstacle = None if name == "onnxruntime" else why_not_cuda(bundle.manifest)
    if name == "cuda" and obstacle is not None:
        raise FramesinkError(
            f"The cuda executor cannot run here: {obstacle}. The onnxruntime executor can."
        )
    # Imported here: a host that runs another executor may lack this one's packages.
    if name != "onnxruntime" and obstacle is None:
        from framesink.runtime.executors.cuda.executor import CudaExecutor

        why = "this machine has a GPU for it" if name == "auto" else "asked for by name"
        return CudaExecutor.from_bundle(bundle, num_pages=num_pages), f"cuda on the GPU: {why}."
    from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor

    executor = OnnxRuntimeExecutor.from_bundle(bundle, num_pages=num_pages, threads=threads)
    why = "asked for by name" if obstacle is None else f"the cuda executor cannot run: {obstacle}"
    return executor, f"onnxruntime on the CPU: {why}."


def create_prompt_executor(
    bundle: Bundle, options: TensorRTLLMOptions, *, max_sessions: int
) -> tuple[PromptExecutor, str]:
    """Load the checkpoint of a bundle into the `tensorrt_llm` executor, for so many sessions at
    once; also returns one sentence: which it is, and how it runs.

    Raises what `TensorRTLLMExecutor.from_bundle` raises.
    """
    from framesink.runtime.executors.tensorrt_llm.executor import TensorRTLLMExecutor

    executor = TensorRTLLMExecutor.from_bundle(bundle, options, max_sessions=max_sessions)
    return executor, executor.reason


def create_vision_encoder(
    bundle: Bundle, name: str = "auto", *, threads: int | None = None
) -> VisionEncoder:
    """Load a bundle's vision encoder alone, for a process that runs no language model.

    Arguments and errors are those of `create_executor`; it runs on the CPU.
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
