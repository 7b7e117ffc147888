"""Measure how far a bundle is from the 16-bit checkpoint it was made from, over live video."""

from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from framesink.build.device import INSTALL_HINT
from framesink.build.estimate import compiled_bytes
from framesink.build.footage import Footage
from framesink.build.gate import Verification
from framesink.build.streamed_comparison import compare_over_footage, session_pages
from framesink.calibration.agreement import Agreement
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import VerificationError
from framesink.runtime.executors import create_executor
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.config import ModelConfig

CHUNKS = 32
# A large model takes minutes per chunk on a CPU: only the beginning of a stream is compared.
LARGE_MODEL_BYTES = 2_000_000_000
LARGE_MODEL_CHUNKS = 4


def judged_chunks(config: ModelConfig) -> int:
    """How many chunks a model of these sizes is compared over."""
    size = sum(compiled_bytes(config).values())
    return CHUNKS if size <= LARGE_MODEL_BYTES else LARGE_MODEL_CHUNKS


def measure_quality(
    bundle: Bundle,
    checkpoint_directory: Path,
    footage: Footage,
    *,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Verification:
    """Compare a bundle with its checkpoint over live video: the chunks of `footage` to judge on.

    The checkpoint runs in torch, in float32; the bundle gets the same frames and tokens in ONNX
    Runtime. The checkpoint decides the tokens; eviction and replies are those of a live
    session with the bundle's defaults.

    Raises VerificationError if the checkpoint is quantized or of another model, if torch is
    missing, or if the bundle's logits are not finite; CheckpointError and VideoError for what
    cannot be read.
    """
    checkpoint = open_reference(checkpoint_directory, bundle.manifest.model)
    if find_spec("torch") is None:
        raise VerificationError(
            f"Comparing with a checkpoint over video needs torch; install it with {INSTALL_HINT}."
        )
    # Imported here: only this comparison needs torch.
    from framesink.calibration.torch_executor import TorchExecutor

    pages = session_pages(bundle)
    with ExitStack() as loaded:
        reference = TorchExecutor(checkpoint, num_pages=pages, page_size=bundle.manifest.page_size)
        loaded.callback(reference.close)
        candidate, _ = create_executor(bundle, "onnxruntime", num_pages=pages)
        loaded.callback(candidate.close)
        (turns,) = compare_over_footage(
            bundle, footage, reference, {candidate.name: candidate}, on_progress=on_progress
        ).values()
    agreement = Agreement.of(turns)
    return Verification(
        reference=checkpoint_directory.resolve().name,
        executor=candidate.name,
        source=footage.judged_source,
        chunks=len(turns),
        tokens=agreement.tokens,
        kl=agreement.kl,
        worst_kl=agreement.worst_kl,
        top1=agreement.top1,
    )


def open_reference(directory: Path, config: ModelConfig) -> Checkpoint:
    """The 16-bit checkpoint that a bundle of a model of these sizes is compared with.

    Raises CheckpointError if it cannot be read, VerificationError if it is quantized or of another
    model.
    """
    checkpoint = Checkpoint.open(directory)
    if checkpoint.quantization is not None:
        raise VerificationError(
            f"{directory} is quantized itself; compare the bundle with the 16-bit checkpoint that "
            "it was made from."
        )
    if checkpoint.config != config:
        raise VerificationError(
            f"{directory} is not the checkpoint the bundle was made from: its sizes differ."
        )
    return checkpoint
