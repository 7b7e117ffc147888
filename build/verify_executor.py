"""Compare an executor with ONNX Runtime on one bundle: same frames, same tokens.

Codes of K/V are made by every executor in a way of its own (of keys before RoPE or after it), so
two that are right differ by what both round. With K/V in one byte both are therefore held against
ONNX Runtime over the same weights with K/V that is not quantized.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from framesink.build.footage import Footage
from framesink.build.gate import QualityGate
from framesink.build.shared_steps import SharedSteps
from framesink.build.streamed_comparison import compare_over_footage, session_pages
from framesink.build.unquantized_cache import author_unquantized_cache
from framesink.calibration.agreement import Agreement
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import VerificationError
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import Executor
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor

REFERENCE = "onnxruntime"
ONE_BYTE = ("fp8", "int8")
# Sequences that share a step: an odd number, which an executor may have to fill up.
COPIES = 3
# What ONNX Runtime loses by codes counts up to so many times what the gate allows: codes that lose
# more are worth so little that no executor can be judged by them.
MOST_LOST = 4


@dataclass(frozen=True, slots=True)
class ExecutorReport:
    """How far an executor is from `reference` over `chunks` streamed chunks of `source`.

    `reason` says which executor it is, and why. It ran the session `copies` times in the same
    steps; `agreement` is over every sampled token of the last of them. Where `reference` has K/V
    that is not quantized and the bundle has codes, `same_codes` is ONNX Runtime's own agreement
    with it over the bundle's graphs; else None.
    """

    executor: str
    reason: str
    reference: str
    source: str
    copies: int
    chunks: int
    agreement: Agreement
    same_codes: Agreement | None = None

    def asked(self, gate: QualityGate) -> QualityGate:
        """What `gate` asks of the executor: to lose at most as much as the gate allows beyond what
        ONNX Runtime loses by the same codes, of which `MOST_LOST` times the gate counts."""
        if self.same_codes is None:
            return gate
        lost, allowed = 1.0 - self.same_codes.top1, 1.0 - gate.top1
        return QualityGate(
            top1=max(0.0, gate.top1 - min(lost, MOST_LOST * allowed)),
            kl=gate.kl + min(self.same_codes.kl, MOST_LOST * gate.kl),
        )

    def check(self, gate: QualityGate) -> None:
        """Raises VerificationError, with what was measured and asked, where the executor does not
        reach what `gate` asks of it."""
        found, asked = self.agreement, self.asked(gate)
        if not (found.top1 >= asked.top1 and found.kl <= asked.kl):
            beside = (
                f", where {REFERENCE} itself has {self.same_codes.top1:.4f} and "
                f"{self.same_codes.kl:.4g} with the bundle's K/V"
                if self.same_codes
                else ""
            )
            raise VerificationError(
                f"The {self.executor} executor is too far from {self.reference}: top-1 agreement "
                f"{found.top1:.4f} and mean KL {found.kl:.4g} nats over {found.tokens} tokens "
                f"({self.source}), asked {asked}{beside}; do not serve this bundle with it on "
                "this machine."
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

    Of a bundle with K/V in one byte ONNX Runtime decides over pages that are not quantized, and
    runs the bundle's own graphs beside the executor.

    Raises VerificationError if the executor is ONNX Runtime itself or its logits are not finite,
    what loading the executor raises, and VideoError for video that cannot be read.
    """
    manifest = bundle.manifest
    pages = session_pages(bundle)
    copies = min(COPIES, manifest.limits.max_streams)
    with ExitStack() as loaded:
        executor, reason = create_executor(bundle, name, num_pages=copies * (pages - 1) + 1)
        loaded.callback(executor.close)
        if executor.name == REFERENCE:
            raise VerificationError(
                f"{REFERENCE} is what executors are compared with, and nothing else is to be "
                f"compared: {reason}"
            )
        candidates: dict[str, Executor] = {
            executor.name: SharedSteps(
                executor, copies=copies, max_tokens=manifest.limits.max_prefill
            )
        }
        graphs, _ = create_executor(bundle, REFERENCE, num_pages=pages)
        loaded.callback(graphs.close)
        reference, described = graphs, REFERENCE
        if manifest.cache_precision in ONE_BYTE:
            reference = OnnxRuntimeExecutor.from_bundle(
                bundle, num_pages=pages, language_model=author_unquantized_cache(bundle)
            )
            loaded.callback(reference.close)
            described = f"{REFERENCE} with K/V in {manifest.language_model.executed.compute_type}"
            candidates[REFERENCE] = graphs
        turns = compare_over_footage(
            bundle, footage, reference, candidates, on_progress=on_progress
        )
    agreements = {name: Agreement.of(compared) for name, compared in turns.items()}
    return ExecutorReport(
        executor=executor.name,
        reason=reason,
        reference=described,
        source=footage.judged_source,
        copies=copies,
        chunks=len(turns[executor.name]),
        agreement=agreements[executor.name],
        same_codes=agreements.get(REFERENCE),
    )
