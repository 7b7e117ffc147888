"""The TensorRT executor over a stand-in for TensorRT: the same words as ONNX Runtime's graphs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference.dense_policies import DenseSinkWindow
from reference.executor_sessions import engine_of, words
from reference.paged_stream import PAGE, PagedStream, make_conversation
from reference.quantized_checkpoint import write_quantized_checkpoint
from reference.recording import RecordingExecutor
from reference.scenario import NUM_PAGES, Scenario
from reference.tensorrt_bundle import add_plans, plan_spec

from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import SilentReporter
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError, CapacityError, FramesinkError
from framesink.runtime.executors import create_executor
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.models.quantization import CacheScheme, LinearScheme
from framesink.runtime.preprocess import Grid

torch = pytest.importorskip("torch", reason="the executor keeps its memory in torch")

from fake import gpu_machine  # noqa: E402
from fake import tensorrt as stand_in  # noqa: E402

from framesink.runtime.executors.tensorrt.contract import load_api  # noqa: E402
from framesink.runtime.executors.tensorrt.language_model import LanguageModelPlan  # noqa: E402
from framesink.runtime.executors.tensorrt.plan import Plan  # noqa: E402

EVICTING = Scenario(
    policy=DenseSinkWindow(4, 6, 7, 19),
    query="What happens?",
    questions={3: "How many?", 17: "Which colour?"},
    sizes={0: (56, 84), 11: (112, 112), 23: (84, 56), 29: (56, 56)},
    frame_counts={0: 2, 29: 4},
    max_new_tokens=5,
)


@pytest.fixture(scope="module", params=["tensorrt_rtx", "tensorrt"])
def bundle(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    directory = tmp_path_factory.mktemp(request.param) / "bundle"
    return Bundle.open(add_plans(tiny_bundle, directory, request.param), check="sizes")


def package_of(bundle: Bundle) -> str:
    return bundle.manifest.language_model.plans[0].builder


def test_forty_chunks_with_evictions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine.install(monkeypatch, package_of(bundle))
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    plan, why = create_executor(bundle, "tensorrt", num_pages=NUM_PAGES)
    assert f"sm89.plan through {package_of(bundle)} {stand_in.VERSION}: asked for" in why
    expected, found = RecordingExecutor(graph), RecordingExecutor(plan)
    with engine_of(bundle, expected) as reference, engine_of(bundle, found) as ours:
        assert words(ours, EVICTING, 40) == words(reference, EVICTING, 40)
    itself = package_of(bundle) == "tensorrt_rtx"
    captures = stand_in.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    decoding = 0
    for context in (context for engine in stand_in.engines for context in engine.contexts):
        new = {shapes["cos_new"][1] for shapes in context.runs if "cos_new" in shapes}
        assert (context.captures is captures) == (itself and new == {1})
        decoding += new == {1}
    assert decoding == 1


@pytest.mark.parametrize("talks", [1, 3, 5])
def test_sessions_share_steps(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, talks: int) -> None:
    """Batches are filled up: what is added must not be seen."""
    gpu_machine.install(monkeypatch, package_of(bundle))
    scenario = Scenario(policy=DenseSinkWindow(4, 6, 3, 3), max_new_tokens=6)
    said = {}
    for name in ("onnxruntime", "tensorrt"):
        executor, _ = create_executor(bundle, name, num_pages=NUM_PAGES, threads=1)
        with engine_of(bundle, executor) as engine:
            sessions = [scenario.open_session(engine) for _ in range(talks)]
            for number in range(6):
                for place, session in enumerate(sessions):
                    session.push_chunk(scenario.chunk(number + place))
                said[name, number] = [list(session)[-1].tokens for session in sessions]
    for number in range(6):
        assert said["tensorrt", number] == said["onnxruntime", number]


def test_logits_are_those_of_one_dense_forward(
    tiny_bundle_with_pages: Callable[[int], Path],
    tiny_model: object,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Prefill parts and decode steps of sequences whose pages have holes."""
    gpu_machine.install(monkeypatch, "tensorrt")
    path = add_plans(tiny_bundle_with_pages(PAGE), tmp_path / "bundle", "tensorrt")
    executor, _ = create_executor(Bundle.open(path), "tensorrt", num_pages=64)
    talks = [
        make_conversation(tiny_model, 1, Grid(1, 6, 8), before=9, after=14),
        make_conversation(tiny_model, 2, Grid(2, 4, 4), before=3, after=25),
        make_conversation(tiny_model, 3, Grid(1, 4, 2), before=17, after=6),
    ]
    pages = np.random.default_rng(0).permutation(np.arange(1, 64)).tolist()
    streams = [PagedStream(executor, talk, pages, seed) for seed, talk in enumerate(talks)]
    for counts in [(11, 2, 5), (8, 9, 1), (1, 1, 12), (1, 1, 1), (5, 1, 1), (1, 1, 1)]:
        batch = [stream.next(count) for stream, count in zip(streams, counts, strict=True)]
        for stream, logits in zip(streams, executor.step(batch), strict=True):
            assert logits.dtype == np.float32
            expected = stream.expected()
            assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()


def test_a_chunk_beyond_the_profile_is_encoded_step_by_step(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_machine.install(monkeypatch, package_of(bundle))
    executor, _ = create_executor(bundle, "tensorrt", num_pages=8)
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=8, threads=1)
    limit = bundle.manifest.limits.max_patches
    grid = Grid(5, 6, 8)
    assert grid.patches > limit >= grid.h * grid.w
    patches = np.random.default_rng(3).standard_normal((grid.patches, 1176)).astype(np.float32)
    expected = graph.encode_vision(patches, grid)
    found = np.asarray(executor.encode_vision(patches, grid))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    wide = Grid(1, 2, limit)
    with pytest.raises(CapacityError, match="was built for"):
        executor.encode_vision(np.zeros((wide.patches, 1176), np.float32), wide)


def test_shapes_beyond_the_limits_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_machine.install(monkeypatch, package_of(bundle))
    limits = bundle.manifest.limits
    most = limits.max_streams * limits.max_context // bundle.manifest.page_size + 1
    with pytest.raises(CapacityError, match=f"more than the {most}"):
        create_executor(bundle, "tensorrt", num_pages=most + 1)


class ReplayedWork:
    """A captured step, as a CUDA graph would repeat it: the same work in the same memory."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


def test_a_repeated_decode_step_is_captured_once(tiny_bundle: Path, tmp_path: Path) -> None:
    """Over a stand-in of a graph; each captured shape has a context that runs no other."""
    directory = add_plans(tiny_bundle, tmp_path / "bundle", "tensorrt")
    bundle = Bundle.open(directory, check="sizes")
    spec = plan_spec(bundle.manifest, "language_model", "tensorrt")
    captured = []

    def capture(work: Callable[[], None], device: object) -> tuple[ReplayedWork, None]:
        captured.append(work)
        return ReplayedWork(work), None

    def model(**options: object) -> LanguageModelPlan:
        api = stand_in.as_module("tensorrt")
        plan = Plan(api, bundle.path(spec.path), spec, torch.device("cpu"))
        plan.use_scratch(torch.empty(plan.scratch_bytes, dtype=torch.uint8))
        return LanguageModelPlan(plan, 8, **options)

    stand_in.engines.clear()
    replaying, eager = model(capture_graph=capture), model()
    random = np.random.default_rng(0)
    for step, (count, pages) in enumerate([(1, 1), (2, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 1)]):
        inputs = decode_inputs(spec, count, pages, random)
        row = step % 16
        places = torch.tensor([[3, 4][:count], [row] * count, range(count), [0] * count])
        found = replaying.run(inputs, places).clone()
        assert torch.equal(found, eager.run(inputs, places))
    for name, pool in eager.pools.items():
        assert pool.count_nonzero() > 0
        assert torch.equal(replaying.pools[name], pool)
    assert len(captured) == 2
    contexts = stand_in.engines[0].contexts
    assert len(contexts) == 3
    assert {len({run["mask"] for run in context.runs}) for context in contexts[1:]} == {1}


def decode_inputs(
    spec: object, count: int, pages: int, random: np.random.Generator
) -> dict[str, object]:
    """Random inputs of a decode step over pages 1 and 2."""
    sizes = {"batch": count, "new": 1, "pages": pages, "context": pages * 16}
    sizes["keys"] = sizes["context"] + 1
    inputs = {}
    for value in spec.inputs:
        if "_pages." in value.name:
            continue
        shape = [sizes.get(size, size) for size in value.shape]
        if value.dtype == "int32":
            high = 3 if value.name == "block_table" else 1
            inputs[value.name] = torch.from_numpy(random.integers(0, high, shape).astype(np.int32))
        else:
            values = random.standard_normal(shape).astype(np.float32)
            inputs[value.name] = torch.from_numpy(values)
    return inputs


def test_a_plan_that_tensorrt_refuses(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "broken.plan"
    file.write_bytes(b"not a plan")
    spec = bundle.manifest.language_model.plans[0]
    with pytest.raises(BundleError, match="cannot be loaded here; TensorRT says: Magic tag"):
        Plan(stand_in.as_module(), file, spec, torch.device("cpu"))
    file.write_bytes(b"")
    with pytest.raises(BundleError, match="Cannot read"):
        Plan(stand_in.as_module(), file, spec, torch.device("cpu"))


def test_the_real_package_refuses_in_a_sentence(bundle: Bundle, tmp_path: Path) -> None:
    """Its logger, its runtime and its way to read a file, which need no GPU to fail."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    file = tmp_path / "broken.plan"
    file.write_bytes(b"not a plan" * 1000)
    spec = bundle.manifest.language_model.plans[0]
    with pytest.raises(BundleError, match=r"cannot be loaded here; TensorRT says: \S.*\.$"):
        Plan(load_api("tensorrt_rtx"), file, spec, torch.device("cpu"))


def test_a_plan_must_be_what_the_manifest_says(bundle: Bundle) -> None:
    spec = bundle.manifest.language_model.plans[0]
    file = bundle.path(spec.path)
    other_type = spec.inputs[0].model_copy(update={"dtype": "float16"})
    prefill, decode = spec.profiles
    lies = [
        ({"inputs": (other_type, *spec.inputs[1:])}, "inputs_embeds differs"),
        ({"outputs": spec.outputs[1:]}, "differs"),
        ({"profiles": (prefill,)}, "the number of its profiles differs"),
        ({"profiles": (decode, prefill)}, "in the profile"),
    ]
    for change, sentence in lies:
        with pytest.raises(BundleError, match=sentence):
            Plan(stand_in.as_module(), file, spec.model_copy(update=change), torch.device("cpu"))


def test_a_failing_run_says_what_tensorrt_says(bundle: Bundle) -> None:
    spec = bundle.manifest.language_model.plans[0]
    plan = Plan(stand_in.as_module(), bundle.path(spec.path), spec, torch.device("cpu"))
    plan.use_scratch(torch.empty(plan.scratch_bytes, dtype=torch.uint8))
    context = plan.context(0)
    with pytest.raises(FramesinkError, match=r"failed to run; TensorRT says: enqueueV3"):
        plan.launch(context)
    with pytest.raises(FramesinkError, match=r"shape of inputs_embeds, cos_new.*no reason"):
        plan.bind(context, {"last": torch.zeros(1, dtype=torch.int32)}, {})
    with pytest.raises(FramesinkError, match=r"refuses last of shape \[999\]"):
        plan.bind(context, {"last": torch.zeros(999, dtype=torch.int32)}, {})
    contradicting = {"last": torch.zeros(2, dtype=torch.int32), "cos_new": torch.zeros(1, 1, 8)}
    with pytest.raises(FramesinkError, match="shapes contradict each other"):
        plan.bind(context, contradicting, {})


@pytest.mark.parametrize("cache", [CacheScheme.INT8, CacheScheme.FP8])
def test_quantized_pages_hold_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: CacheScheme
) -> None:
    """FP8 rows leave the graph typed so, and go into pages typed int8."""
    scheme = LinearScheme.INT8 if cache is CacheScheme.INT8 else LinearScheme.FP8
    write_quantized_checkpoint(tiny_checkpoint, tmp_path / "checkpoint", scheme, cache)
    for file in companion_files(tiny_checkpoint):
        shutil.copy(file, tmp_path / "checkpoint")
    options = BuildOptions(
        tmp_path / "checkpoint",
        tmp_path / "plain",
        plans=False,
        executed_type="float32",
        max_streams=2,
        max_context=1024,
    )
    build_bundle(options, SilentReporter())
    bundle = Bundle.open(add_plans(tmp_path / "plain", tmp_path / "bundle"), check="sizes")
    rows = {v.dtype for v in bundle.manifest.language_model.executed.outputs if "_new." in v.name}
    assert rows == {"int8" if cache is CacheScheme.INT8 else "float8_e4m3fn"}
    gpu_machine.install(monkeypatch, "tensorrt_rtx")
    scenario = Scenario(policy=DenseSinkWindow(4, 6, 3, 3), max_new_tokens=5)
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=128, threads=1)
    plan, _ = create_executor(bundle, "tensorrt", num_pages=128)
    with engine_of(bundle, graph) as reference, engine_of(bundle, plan) as ours:
        assert words(ours, scenario, 8) == words(reference, scenario, 8)
        for name, pool in plan._language_model.pools.items():
            assert pool.dtype == torch.int8
            written = graph.pages[name][1:]  # the null page takes what fills up a batch
            assert np.count_nonzero(written) > 0
            assert (pool.numpy()[1:] != written).mean() < 1e-3
