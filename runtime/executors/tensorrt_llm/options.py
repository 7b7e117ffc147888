"""How the `tensorrt_llm` executor is set up."""

from dataclasses import dataclass
from pathlib import Path

from framesink.runtime.errors import OptionError
from framesink.runtime.prompting.executor import PromptSettings

TRIM_TURNS = 4


@dataclass(frozen=True, slots=True)
class TensorRTLLMOptions:
    """Settings of one engine.

    `checkpoint` is a Hugging Face directory that TensorRT-LLM reads, by default the bundle's own.
    For `trim_turns`, `reply_seconds` and `drain_seconds` see PromptSettings. `load_seconds` bounds
    the trial prompt after loading. TensorRT-LLM takes `gpu_memory_fraction` of the memory that the
    weights leave for its K/V cache, and spreads the model over `tensor_parallel_size` GPUs.

    Raises OptionError for values that make no sense.
    """

    checkpoint: Path | None = None
    trim_turns: int = TRIM_TURNS
    reply_seconds: float = 30.0
    drain_seconds: float = 10.0
    load_seconds: float = 300.0
    gpu_memory_fraction: float = 0.8
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.gpu_memory_fraction < 1.0:
            raise OptionError(
                f"gpu_memory_fraction={self.gpu_memory_fraction:g} must be between 0 and 1."
            )
        if self.tensor_parallel_size < 1 or not self.load_seconds > 0:
            raise OptionError(
                f"tensor_parallel_size={self.tensor_parallel_size} and "
                f"load_seconds={self.load_seconds:g} must be above 0."
            )
        _ = self.prompting

    @property
    def prompting(self) -> PromptSettings:
        """How its sessions are run."""
        return PromptSettings(self.trim_turns, self.reply_seconds, self.drain_seconds)
