"""Executors: where the weights and the K/V pages live."""

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import FramesinkError
from framesink.runtime.executors.base import Executor, VisionEncoder
from framesink.runtime.executors.cuda.support import why_not_cuda
from framesink.runtime.executors.tensorrt.support import find_plans, why_not_tensorrt
from framesink.runtime.executors.tensorrt_llm.options import TensorRTLLMOptions
from framesink.runtime.gpu import current_sm
from framesink.runtime.prompting.executor import PromptExecutor

AVAILABLE = ("onnxruntime", "tensorrt", "cuda", "tensorrt_llm")
# Where `cuda` comes before `tensorrt`: A100, H100 and H200, B200, B300.
DATA_CENTER_SMS = ("sm80", "sm90", "sm100", "sm103")


def create_executor(
    bundle: Bundle, name: str = "auto", *, num_pages: int, threads: int | None = None
) -> tuple[Executor, str]:
    """Load a bundle into an executor; also returns one sentence: which it is, and why.

    "auto" is `cuda` on data-center GPUs, else `tensorrt` where a plan fits the GPU and the
    installed package, else whichever can run. `num_pages` counts pages of the bundle's page size,
    the null page included. `threads` is for the CPU (None: one per physical core). Raises
    FramesinkError for a name that is unknown or not available here, or of an executor without pages
    (see `create_prompt_executor`), and what the executor's own loading raises.
    """
    _require_available(name)
    if name == "tensorrt_llm":
        raise FramesinkError(
            "The tensorrt_llm executor takes whole prompts and no steps, so it cannot be used here."
        )
    chosen, why = choose_executor(bundle) if name == "auto" else (name, "asked for by name")
    # Imported here: a host that runs another executor may lack this one's packages.
    if chosen == "cuda":
        obstacle = why_not_cuda(bundle.manifest)
        if obstacle is not None:
            raise FramesinkError(
                f"The cuda executor cannot run here: {obstacle}. The onnxruntime executor can."
            )
        from framesink.runtime.executors.cuda.executor import CudaExecutor

        return CudaExecutor.from_bundle(bundle, num_pages=num_pages), f"cuda on the GPU: {why}."
    if chosen == "tensorrt":
        plans = find_plans(bundle)
        from framesink.runtime.executors.tensorrt.executor import TensorRTExecutor

        executor = TensorRTExecutor.from_bundle(bundle, plans, num_pages=num_pages)
        return executor, f"tensorrt on the GPU, {plans}: {why}."
    from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor

    host = OnnxRuntimeExecutor.from_bundle(bundle, num_pages=num_pages, threads=threads)
    return host, f"onnxruntime on the CPU: {why}."


def choose_executor(bundle: Bundle) -> tuple[str, str]:
    """What "auto" is for a bundle on this machine, and why, as the end of a sentence."""
    no_cuda = why_not_cuda(bundle.manifest)
    if no_cuda is None and current_sm() in DATA_CENTER_SMS:
        return "cuda", "this machine has a data-center GPU"
    no_tensorrt = why_not_tensorrt(bundle)
    if no_tensorrt is None:
        return "tensorrt", "the bundle has plans that fit this GPU and the installed package"
    if no_cuda is None:
        return "cuda", f"this machine has a GPU for it, and tensorrt cannot run ({no_tensorrt})"
    why = f"the cuda executor cannot run: {no_cuda}"
    if current_sm() is not None:
        why += f"; nor can tensorrt ({no_tensorrt})"
    return "onnxruntime", why


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
        raise FramesinkError(
            f"The executor {name[:64]!r} is unknown; available are auto, {', '.join(AVAILABLE)}."
        )
