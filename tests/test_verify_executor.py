"""`framesink verify --executor`: an executor against ONNX Runtime, on this machine."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from reference.tensorrt_bundle import add_plans

torch = pytest.importorskip("torch", reason="the executors compared run in torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401, I001
from fake import gpu_machine  # noqa: E402
from fake import tensorrt as stand_in  # noqa: E402
from reference.cpu_executor import cpu_executor  # noqa: E402

from framesink.build.footage import Footage  # noqa: E402
from framesink.build.gate import DEFAULT_GATE  # noqa: E402
from framesink.build.verify_executor import verify_executor  # noqa: E402
from framesink.calibration.agreement import Agreement  # noqa: E402
from framesink.cli.main import framesink  # noqa: E402
from framesink.runtime.arrays import Float32Array  # noqa: E402
from framesink.runtime.bundle import Bundle  # noqa: E402
from framesink.runtime.executors.base import Executor, SequenceInput  # noqa: E402
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor  # noqa: E402


def run(*arguments: object) -> Result:
    return CliRunner().invoke(framesink, ["verify", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def with_plans(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_plans(tiny_bundle, tmp_path_factory.mktemp("plans") / "bundle")


def test_tensorrt_is_compared_over_a_stream_that_evicts(
    with_plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_machine.install(monkeypatch, "tensorrt_rtx")
    result = run(with_plans, "--executor", "tensorrt", "--chunks", 20, "--gate", "top1=1,kl=1e-6")
    assert result.exit_code == 2  # a gate is written without exponents
    result = run(
        with_plans, "--executor", "tensorrt", "--chunks", 20, "--gate", "top1=1,kl=0.00001"
    )
    assert result.exit_code == 0, result.output
    for words in ("tensorrt against onnxruntime", "100.00%", "20 chunks", "asked for by name"):
        assert words in result.stdout
    # Three sessions share each decode step, which is filled up to four.
    runs = [r for engine in stand_in.engines for c in engine.contexts for r in c.runs]
    assert {shapes["last"] for shapes in runs if shapes.get("cos_new", (0, 0))[1] == 1} == {(4,)}


def test_auto_is_compared_as_what_it_chooses(
    with_plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_machine.install(monkeypatch, "tensorrt_rtx")
    result = run(with_plans, "--executor", "auto", "--chunks", 2)
    assert result.exit_code == 0, result.output
    assert "tensorrt against onnxruntime" in result.stdout
    assert "plans that fit this GPU" in result.stdout.replace("\n", " ")


def test_cuda_is_compared_too(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contexts on the GPU follow the editions of the recorded ones."""

    def create(bundle: Bundle, name: str, *, num_pages: int) -> tuple[Executor, str]:
        if name == "onnxruntime":
            return OnnxRuntimeExecutor.from_bundle(bundle, num_pages=num_pages, threads=1), ""
        return cpu_executor(bundle, num_pages=num_pages), "cuda over plain kernels."

    monkeypatch.setattr("framesink.build.verify_executor.create_executor", create)
    bundle = Bundle.open(tiny_bundle, check="sizes")
    shares: list[float] = []
    report = verify_executor(bundle, "cuda", Footage.whole((), 20), on_progress=shares.append)
    assert report.executor == "cuda"
    assert report.agreement.differing_tokens == 0
    assert report.agreement.tokens > 20
    assert report.agreement.kl < 1e-4
    assert shares == [number / 20 for number in range(20)]
    report.check(DEFAULT_GATE)


class ForgetfulExecutor(OnnxRuntimeExecutor):
    """One that writes rows into no page: right until a token looks back."""

    name = "broken"

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        answers = super().step(batch)
        for pool in self.pages.values():
            pool[:] = 0
        return answers


class MixedUpExecutor(OnnxRuntimeExecutor):
    """One that is right for the first sequence of a step alone."""

    name = "broken"

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        answers = super().step(batch)
        return [None if row is None else np.roll(row, n) for n, row in enumerate(answers)]


@pytest.mark.parametrize("broken", [ForgetfulExecutor, MixedUpExecutor])
def test_an_executor_below_the_gate_ends_with_8(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, broken: type[OnnxRuntimeExecutor]
) -> None:
    def create(bundle: Bundle, name: str, *, num_pages: int) -> tuple[Executor, str]:
        kind = OnnxRuntimeExecutor if name == "onnxruntime" else broken
        return kind.from_bundle(bundle, num_pages=num_pages, threads=1), f"{name}."

    monkeypatch.setattr("framesink.build.verify_executor.create_executor", create)
    result = run(tiny_bundle, "--executor", "broken", "--chunks", 2)
    assert result.exit_code == 8
    assert "too far from onnxruntime" in result.stderr
    assert "asked top1=0.98,kl=0.02" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--executor", "tensorrt"], 4, "needs a GPU and this machine has none"),
        (["--executor", "onnxruntime", "--chunks", "2"], 8, "what executors are compared with"),
        (["--executor", "abacus"], 1, "'abacus' is unknown"),
        (["--executor", "tensorrt", "--checkpoint", "."], 2, "ask for one"),
        (["--chunks", "3"], 2, "goes with --executor"),
    ],
)
def test_what_cannot_be_compared_is_said(
    with_plans: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr("framesink.runtime.bundle.current_sm", lambda: None)
    monkeypatch.setattr("framesink.runtime.executors.tensorrt.support.current_sm", lambda: None)
    result = run(with_plans, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr


def test_tokens_that_differ_are_counted() -> None:
    agreement = Agreement(tokens=640, kl=0.0, worst_kl=0.0, top1=637 / 640)
    assert agreement.differing_tokens == 3
