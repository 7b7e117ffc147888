"""Compare an executor with ONNX Runtime on one bundle: same frames, same tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from framesink.build.footage import Footage
from framesink.build.gate import QualityGate
from framesink.build.shared_steps import SharedSteps
from framesink.calibration.agreement import Agreement, TurnAgreement, compare_executors
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import VerificationError
from framesink.runtime.executors import create_executor
from framesink.runtime.video.chunk import Chunk

REFERENCE = "onnxruntime"
# Sequences that share a step: an odd number, which an executor may have to fill up.
COPIES = 3


@dataclass(frozen=True, slots=True)
class ExecutorReport:
    """How far an executor is from ONNX Runtime over `chunks` streamed chunks of `source`.

    `reason` says which executor it is, and why. It ran the session `copies` times in the same
    steps; `agreement` is over every sampled token of the last of them.
    """

    executor: str
    reason: str
    source: str
    copies: int
    chunks: int
    agreement: Agreement

    @property
    def differing_tokens(self) -> int:
        """Tokens whose likeliest candidate is another than ONNX Runtime's."""
        return round((1.0 - self.agreement.top1) * self.agreement.tokens)

    def check(self, gate: QualityGate) -> None:
        """Raises VerificationError, with what was measured and asked, below the gate."""
        found = self.agreement
        if not (found.top1 >= gate.top1 and found.kl <= gate.kl):
            raise VerificationError(
                f"The {self.executor} executor is too far from {REFERENCE}: top-1 agreement "
                f"{found.top1:.4f} and mean KL {found.kl:.4g} nats over {found.tokens} tokens "
                f"({self.source}), asked {gate}; do not serve this bundle with it on this machine."
            )


def verify_executor(
    bundle: Bundle,
    name: str,
    footage: Footage,
    *,
    on_progress: Callable[[float], None] = lambda _: None,
) -> ExecutorReport:
    """Stream the chunks of `footage` to judge on through ONNX Runtime, and the same steps with the
    same tokens through the executor `name`: every chunk encoded, prompts in the same parts,
    evictions of a live session with the bundle's defaults. The executor runs them several times at
    once, in pages of their own, as sessions that share its steps do.

    Raises VerificationError if the executor is ONNX Runtime itself or its logits are not finite,
    what loading the executor raises, and VideoError for video that cannot be read.
    """
    manifest = bundle.manifest
    settings = StreamSettings.from_bundle(bundle)
    pages = settings.num_pages(manifest.page_size)
    streams = footage.judged_streams(manifest.preprocess, manifest.streaming.chunk_seconds)
    turns: list[TurnAgreement] = []

    def follow(stream: Iterator[Chunk]) -> Iterator[Chunk]:
        for number, chunk in enumerate(stream):
            on_progress((len(turns) + number) / sum(footage.judged))
            yield chunk

    copies = min(COPIES, manifest.limits.max_streams)
    loaded, reason = create_executor(bundle, name, num_pages=copies * (pages - 1) + 1)
    candidate = SharedSteps(loaded, copies=copies, max_tokens=manifest.limits.max_prefill)
    try:
        if candidate.name == REFERENCE:
            raise VerificationError(
                f"{REFERENCE} is what executors are compared with, and nothing else is to be "
                f"compared: {reason}"
            )
        reference, _ = create_executor(bundle, REFERENCE, num_pages=pages)
        try:
            for stream in streams:
                found = compare_executors(reference, {"": candidate}, settings, follow(stream))
                turns += found[""]
        finally:
            reference.close()
    finally:
        candidate.close()
    return ExecutorReport(
        candidate.name, reason, footage.judged_source, copies, len(turns), Agreement.of(turns)
    )
