"""`framesink verify --executor` of bundles with K/V in one byte: what is compared with what."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from reference.coded_bundle import build_coded_bundle

torch = pytest.importorskip("torch", reason="the executors compared run in torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401, I001
from reference import plain_kernels  # noqa: E402
from reference.cpu_executor import cpu_executor  # noqa: E402

from framesink.build.footage import Footage  # noqa: E402
from framesink.build.gate import DEFAULT_GATE, QualityGate  # noqa: E402
from framesink.build.streamed_comparison import compare_over_footage, session_pages  # noqa: E402
from framesink.build.unquantized_cache import author_unquantized_cache  # noqa: E402
from framesink.build.verify_executor import ExecutorReport, verify_executor  # noqa: E402
from framesink.calibration.agreement import Agreement  # noqa: E402
from framesink.cli.main import framesink  # noqa: E402
from framesink.runtime.arrays import Float32Array  # noqa: E402
from framesink.runtime.bundle import Bundle  # noqa: E402
from framesink.runtime.errors import BundleError, VerificationError  # noqa: E402
from framesink.runtime.executors.base import Executor, SequenceInput  # noqa: E402
from framesink.runtime.executors.cuda.executor import CudaExecutor  # noqa: E402
from framesink.runtime.executors.cuda.kernels.pages import LayerPages  # noqa: E402
from framesink.runtime.executors.cuda.weight_source import BundleWeights  # noqa: E402
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor  # noqa: E402
from framesink.runtime.models.quantization import CacheScheme  # noqa: E402

Tensor = torch.Tensor
CODED = {CacheScheme.INT8: DEFAULT_GATE, CacheScheme.FP8: QualityGate(top1=0.95, kl=0.03)}
FOOTAGE = Footage.whole((), 8)


@pytest.fixture(scope="module")
def coded(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[CacheScheme, Bundle]:
    """Bundles of the tiny checkpoint by how they hold K/V."""
    return {
        scheme: build_coded_bundle(tiny_checkpoint, tmp_path_factory.mktemp(scheme.value), scheme)
        for scheme in CODED
    }


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., CudaExecutor]], None]:
    """Says what `cuda` is."""

    def use(make: Callable[..., CudaExecutor]) -> None:
        def create(bundle: Bundle, name: str, *, num_pages: int) -> tuple[Executor, str]:
            if name == "cuda":
                return make(bundle, num_pages=num_pages), "cuda over plain kernels."
            return OnnxRuntimeExecutor.from_bundle(bundle, num_pages=num_pages, threads=1), ""

        monkeypatch.setattr("framesink.build.verify_executor.create_executor", create)

    return use


def unquantized(bundle: Bundle) -> OnnxRuntimeExecutor:
    graph = author_unquantized_cache(bundle)
    return OnnxRuntimeExecutor.from_bundle(
        bundle, num_pages=session_pages(bundle), threads=1, language_model=graph
    )


@pytest.mark.parametrize("scheme", CODED)
def test_the_reference_is_the_model_before_its_cache_was_quantized(
    coded: dict[CacheScheme, Bundle], tiny_bundle: Path, scheme: CacheScheme
) -> None:
    """Nothing else is quantized in these bundles, so it says what the plain bundle says."""
    bundle = coded[scheme]
    before = {file: bundle.path(file).stat().st_mtime_ns for file in bundle.manifest.files}
    plain = Bundle.open(tiny_bundle, check="sizes")
    pages = session_pages(bundle)
    executors = {
        "plain": OnnxRuntimeExecutor.from_bundle(plain, num_pages=pages, threads=1),
        "codes": OnnxRuntimeExecutor.from_bundle(bundle, num_pages=pages, threads=1),
    }
    turns = compare_over_footage(bundle, Footage.whole((), 4), unquantized(bundle), executors)
    found = {name: Agreement.of(compared) for name, compared in turns.items()}
    assert found["plain"].worst_kl < 1e-9
    assert found["codes"].kl > 1e-4
    assert {file: (bundle.directory / file).stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("scheme", CODED)
def test_codes_of_another_form_pass(
    coded: dict[CacheScheme, Bundle],
    cuda: Callable[[Callable[..., CudaExecutor]], None],
    scheme: CacheScheme,
) -> None:
    cuda(cpu_executor)
    shares: list[float] = []
    report = verify_executor(coded[scheme], "cuda", FOOTAGE, on_progress=shares.append)
    report.check(CODED[scheme])
    assert report.reference == "onnxruntime with K/V in float32"
    assert report.same_codes is not None
    # Both are rounded, each in its own way.
    assert 1e-4 < report.agreement.kl != report.same_codes.kl > 1e-4
    assert report.agreement.tokens == report.same_codes.tokens > 20
    assert report.chunks == 8
    assert shares == [number / 8 for number in range(8)]


class MisplacingExecutor(CudaExecutor):
    """Writes new rows a page too far."""

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        slots = self.num_pages * self.page_size
        return super().step(
            [replace(given, slots=(given.slots + self.page_size) % slots) for given in batch]
        )


class UnbiasedWeights(BundleWeights):
    """Has lost the bias of keys."""

    def find(self, name: str) -> Tensor | None:
        found = super().find(name)
        return None if found is None else self._without_bias(name, found)

    def get(self, name: str) -> Tensor:
        return self._without_bias(name, super().get(name))

    @staticmethod
    def _without_bias(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name.endswith("k_proj.bias") else tensor


def misplacing(bundle: Bundle, *, num_pages: int) -> CudaExecutor:
    return cpu_executor(bundle, MisplacingExecutor, num_pages=num_pages)


def unbiased(bundle: Bundle, *, num_pages: int) -> CudaExecutor:
    weights = UnbiasedWeights(bundle, torch.device("cpu"))
    return cpu_executor(bundle, weights=weights, num_pages=num_pages)


@pytest.mark.parametrize("scheme", CODED)
@pytest.mark.parametrize("broken", [misplacing, unbiased])
def test_an_executor_that_is_broken_fails(
    coded: dict[CacheScheme, Bundle],
    cuda: Callable[[Callable[..., CudaExecutor]], None],
    scheme: CacheScheme,
    broken: Callable[..., CudaExecutor],
) -> None:
    cuda(broken)
    report = verify_executor(coded[scheme], "cuda", FOOTAGE)
    with pytest.raises(VerificationError, match="where onnxruntime itself has"):
        report.check(CODED[scheme])


@pytest.mark.parametrize("scheme", CODED)
def test_values_read_a_tenth_too_large_fail(
    coded: dict[CacheScheme, Bundle],
    cuda: Callable[[Callable[..., CudaExecutor]], None],
    monkeypatch: pytest.MonkeyPatch,
    scheme: CacheScheme,
) -> None:
    read_rows = plain_kernels.read_rows

    def read(pages: LayerPages, slots: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = read_rows(pages, slots)
        return keys, values * 1.1

    monkeypatch.setattr(plain_kernels, "read_rows", read)
    cuda(cpu_executor)
    report = verify_executor(coded[scheme], "cuda", FOOTAGE)
    with pytest.raises(VerificationError, match="too far from onnxruntime with K/V in float32"):
        report.check(CODED[scheme])


def test_the_table_says_what_was_compared_with_what(
    coded: dict[CacheScheme, Bundle],
    cuda: Callable[[Callable[..., CudaExecutor]], None],
) -> None:
    cuda(cpu_executor)
    directory = str(coded[CacheScheme.INT8].directory)
    arguments = ["verify", directory, "--executor", "cuda", "--chunks", "2"]
    result = CliRunner().invoke(framesink, [*arguments, "--gate", "top1=0.8,kl=0.02"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "cuda and onnxruntime are both compared with onnxruntime with K/V in float32" in text
    for heading in ("against", " cuda ", " onnxruntime ", "asked of cuda"):
        assert heading in text
    result = CliRunner().invoke(framesink, [*arguments, "--gate", "kl=0"])
    assert result.exit_code == 8
    assert "asked kl=0, where onnxruntime itself has" in result.stderr


def report_beside(top1: float, kl: float) -> ExecutorReport:
    found = Agreement(tokens=100, kl=0.0, worst_kl=0.0, top1=1.0)
    same_codes = Agreement(tokens=100, kl=kl, worst_kl=kl, top1=top1)
    return ExecutorReport("cuda", "", "onnxruntime", "clip", 3, 4, found, same_codes)


@pytest.mark.parametrize(
    ("top1", "kl", "asked"),
    [
        (1.0, 0.0, (0.98, 0.02)),
        (0.97, 0.01, (0.95, 0.03)),
        (0.92, 0.08, (0.90, 0.10)),
        # Four times what the gate allows is the most that counts.
        (0.10, 9.00, (0.90, 0.10)),
    ],
)
def test_an_executor_may_lose_what_the_gate_allows_beyond_what_the_codes_lose(
    top1: float, kl: float, asked: tuple[float, float]
) -> None:
    gate = report_beside(top1, kl).asked(DEFAULT_GATE)
    assert (gate.top1, gate.kl) == pytest.approx(asked)


def test_half_a_gate_stays_half() -> None:
    report = report_beside(0.97, 0.01)
    assert report.asked(QualityGate.parse("top1=0.9")).kl == float("inf")
    assert report.asked(QualityGate.parse("kl=0.1")).top1 == 0.0


def test_a_graph_in_memory_that_does_not_load_is_named(
    coded: dict[CacheScheme, Bundle], tmp_path: Path
) -> None:
    bundle = coded[CacheScheme.INT8]
    lost = replace(author_unquantized_cache(bundle), weights=tmp_path)
    with pytest.raises(BundleError, match="cannot load language_model: "):
        OnnxRuntimeExecutor.from_bundle(bundle, num_pages=4, threads=1, language_model=lost)
