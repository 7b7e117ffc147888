"""Compiling to TensorRT: builders and targets, profiles, messages, progress, cancelling."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from framesink.build.plans.builder import (
    PlanBuilder,
    choose_builder,
    find_builders,
    resolve_targets,
)
from framesink.build.plans.compile import compile_plan
from framesink.build.plans.jobs import CompileJob
from framesink.build.plans.messages import BuilderMessage
from framesink.build.plans.process import compile_in_process
from framesink.build.plans.profiles import language_model_profiles, vision_profiles
from framesink.build.plans.progress import PhaseTree
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import Limits, OptimizationProfile, ProfileShape
from framesink.runtime.models.vision_segments import frame_segments, window_segments
from framesink.runtime.preprocess import Grid

RTX = PlanBuilder("tensorrt_rtx", "1.7", ("sm75", "sm80", "sm86", "sm89", "sm120"), True)
FULL = PlanBuilder("tensorrt", "10.15", ("sm90",), False)

needs_rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in [builder.name for builder in find_builders()],
    reason="tensorrt_rtx is not installed",
)


def _value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _save(path: Path, graph: onnx.GraphProto) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.save(model, path)
    return path


def _matmul_job(directory: Path, layers: int = 2) -> CompileJob:
    """A chain of matrix products with a dynamic batch."""
    weights = [
        numpy_helper.from_array(np.eye(8, dtype=np.float16), f"w{index}") for index in range(layers)
    ]
    nodes = [
        helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"x{index + 1}"])
        for index in range(layers)
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [_value("x0", TensorProto.FLOAT16, ["batch", 8])],
        [_value(f"x{layers}", TensorProto.FLOAT16, ["batch", 8])],
        weights,
    )
    shape = ProfileShape(minimum=(1, 8), optimum=(2, 8), maximum=(4, 8))
    return CompileJob(
        graph=_save(directory / "chain.onnx", graph),
        plan=directory / "chain.plan",
        builder="tensorrt_rtx",
        targets=("sm89",),
        profiles=(OptimizationProfile(name="only", inputs={"x0": shape}),),
    )


@pytest.mark.parametrize(
    ("requested", "builder", "targets"),
    [
        (["sm89", "sm80", "sm89"], RTX, ("sm80", "sm89")),
        (["sm120", "sm86"], RTX, ("sm86", "sm120")),
        (["sm90"], FULL, ("sm90",)),
        ([], FULL, ("sm90",)),
    ],
)
def test_the_first_builder_that_knows_all_targets_is_taken(
    requested: list[str], builder: PlanBuilder, targets: tuple[str, ...]
) -> None:
    assert choose_builder(requested, [FULL, RTX]) == (builder, targets)


def test_without_targets_a_cross_compiler_takes_the_common_ones() -> None:
    assert choose_builder([], [RTX]) == (RTX, ("sm80", "sm86", "sm89", "sm120"))


def test_targets_nobody_knows_are_refused_with_those_that_are() -> None:
    with pytest.raises(BuildError, match=r"sm100: tensorrt_rtx 1\.7 knows sm75, sm80.*sm120\.$"):
        choose_builder(["sm100", "sm89"], [RTX])
    with pytest.raises(BuildError, match="No single builder compiles for sm89, sm90 together"):
        choose_builder(["sm90", "sm89"], [FULL, RTX])


def test_fp8_is_refused_where_it_does_not_run() -> None:
    with pytest.raises(BuildError, match=r"sm80, sm86; compile for sm89 and sm120, or choose int8"):
        choose_builder(["sm86", "sm80", "sm89"], [RTX], fp8=True)
    assert choose_builder(["sm120", "sm89"], [RTX], fp8=True) == (RTX, ("sm89", "sm120"))
    assert choose_builder(["sm90"], [FULL, RTX], fp8=True) == (FULL, ("sm90",))


def test_fp8_without_targets_takes_those_that_can() -> None:
    assert choose_builder([], [RTX], fp8=True) == (RTX, ("sm89", "sm120"))
    assert choose_builder([], [FULL], fp8=True) == (FULL, ("sm90",))
    ampere = replace(FULL, targets=("sm80",))
    with pytest.raises(BuildError, match="FP8 does not run on sm80"):
        choose_builder([], [ampere], fp8=True)


def test_without_a_builder_the_sentence_says_how_to_get_one() -> None:
    with pytest.raises(BuildError, match=r"pip install 'framesink\[rtx\]', or pass --no-plans"):
        choose_builder([], [])


@pytest.mark.parametrize("name", ["89", "sm8.9", "SM89", "ada", ""])
def test_a_target_is_written_one_way(name: str) -> None:
    with pytest.raises(BuildError, match="write an architecture as sm89"):
        resolve_targets([name])


def test_current_is_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framesink.build.plans.builder.current_sm", lambda: "sm86")
    assert resolve_targets(["sm120", "current"]) == ("sm86", "sm120")
    monkeypatch.setattr("framesink.build.plans.builder.current_sm", lambda: None)
    with pytest.raises(BuildError, match="needs a GPU"):
        resolve_targets(["current"])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Unused Input: nonpad_kv_seqlen", True),
        ("Attribute axis is out of range. Clamping to: 3", True),
        ("One or more weights outside the range of FLOAT was clamped", True),
        ('TensorRT currently ignores the "seed" field in RandomUniform', True),
        ("output_dtype is not set. Defaulting to FP8.", True),
        ("Detected finite FP32 values which would overflow in FP16 and converted them", True),
        (
            "Running layernorm after self-attention with FP16 Reduce or Pow may cause overflow.",
            True,
        ),
        ("Detected subnormal FP16 values.", False),
        ("Make sure input block_table has Int64 binding.", False),
        ("The timing cache is ignored without a GPU", False),
        ("ScatterND will be converted to ScatterElements.", False),
    ],
)
def test_which_warnings_mean_wrong_numbers(text: str, wrong: bool) -> None:
    assert BuilderMessage("warning", text).means_wrong_numbers is wrong
    assert BuilderMessage("error", text).means_wrong_numbers
    assert not BuilderMessage("info", text).means_wrong_numbers


@given(
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_progress_only_rises_and_ends_at_one(steps: list[int]) -> None:
    """Phases nested one in another, each opened anew in every step of its parent."""
    tree = PhaseTree()
    seen = [0.0]

    def run(level: int, parent: str | None) -> None:
        name = f"phase {level}"
        tree.start(name, parent, steps[level])
        for index in range(steps[level]):
            if level + 1 < len(steps):
                run(level + 1, name)
            tree.step(name, index)
            seen.append(tree.fraction)
        tree.finish(name)

    run(0, None)
    assert seen == sorted(seen)
    assert 0.0 <= seen[1] <= 1.0
    assert tree.fraction == 1.0
    assert tree.current == ""


def test_language_model_profiles_fit_together(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle, check="sizes").manifest
    limits = Limits(max_streams=4, max_context=100, max_prefill=32, max_patches=64)
    inputs = manifest.language_model.compiled.inputs
    prefill, decode = language_model_profiles(inputs, limits, 16)
    for profile, most_new in ((prefill, 32), (decode, 1)):
        assert list(profile.inputs) == [spec.name for spec in inputs]
        for bound in ("minimum", "optimum", "maximum"):
            shape = {name: getattr(value, bound) for name, value in profile.inputs.items()}
            batch, new = shape["inputs_embeds"][:2]
            pages = shape["block_table"][1]
            assert shape["mask"] == (batch, 1, new, 16 * pages + new)
            assert shape["cos_ctx"][:2] == (batch, 16 * pages)
            assert shape["cos_new"][:2] == (batch, new)
        largest = profile.inputs["mask"].maximum
        assert largest == (4, 1, most_new, 7 * 16 + most_new)  # 100 tokens take 7 pages
        assert profile.inputs["k_pages.0"].maximum[0] == 4 * 7 + 1


@pytest.mark.parametrize("grid", [Grid(1, 8, 8), Grid(1, 4, 16), Grid(1, 2, 32), Grid(1, 10, 6)])
def test_vision_profile_holds_every_frame_preprocessing_makes(
    tiny_bundle: Path, grid: Grid
) -> None:
    """Thin frames have the most windows for their size."""
    manifest = Bundle.open(tiny_bundle, check="sizes").manifest
    limits = Limits(max_streams=1, max_context=64, max_prefill=64, max_patches=64)
    vision = manifest.model.vision
    (profile,) = vision_profiles(
        manifest.vision_encoder.compiled.inputs, limits, vision, manifest.preprocess
    )
    shapes = {"patches": (grid.patches, vision.patch_dim)}
    for kind, segments in (
        ("window", window_segments([grid], vision)),
        ("frame", frame_segments([grid])),
    ):
        shapes[f"{kind}_index"] = segments.index.shape
    for name, shape in shapes.items():
        if name in profile.inputs:
            bounds = profile.inputs[name]
            assert all(
                low <= size <= high
                for low, size, high in zip(bounds.minimum, shape, bounds.maximum, strict=True)
            ), name


def test_a_dimension_without_a_limit_is_refused(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle, check="sizes").manifest
    strange = manifest.language_model.compiled.inputs[0].model_copy(update={"shape": ("beams", 4)})
    with pytest.raises(BuildError, match="'beams' that no limit bounds"):
        language_model_profiles([strange], manifest.limits, 16)


@needs_rtx
def test_a_plan_is_streamed_to_disk_and_described(tmp_path: Path) -> None:
    fractions: list[float] = []
    result, peak_memory = compile_in_process(
        _matmul_job(tmp_path),
        on_progress=lambda fraction, _: fractions.append(fraction),
        on_message=lambda _: None,
    )
    assert (tmp_path / "chain.plan").stat().st_size == result.plan_bytes > 0
    assert [(spec.name, spec.dtype, spec.shape) for spec in result.inputs] == [
        ("x0", "float16", ("batch", 8))
    ]
    assert [spec.name for spec in result.outputs] == ["x2"]
    assert fractions == sorted(fractions)
    assert peak_memory > 10_000_000


@needs_rtx
def test_an_input_the_parser_drops_is_an_error(tmp_path: Path) -> None:
    """TensorRT-RTX ignores Attention's nonpad_kv_seqlen with nothing but a warning."""
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"], scale=0.5)],
        "padded",
        [
            _value("q", TensorProto.FLOAT16, [1, 2, 4, 16]),
            _value("k", TensorProto.FLOAT16, [1, 2, 8, 16]),
            _value("v", TensorProto.FLOAT16, [1, 2, 8, 16]),
            _value("lengths", TensorProto.INT64, [1]),
        ],
        [_value("y", TensorProto.FLOAT16, [1, 2, 4, 16])],
    )
    job = CompileJob(
        graph=_save(tmp_path / "padded.onnx", graph),
        plan=tmp_path / "padded.plan",
        builder="tensorrt_rtx",
        targets=("sm89",),
        profiles=(),
    )
    with pytest.raises(BuildError, match="Unused Input: lengths"):
        compile_in_process(job, on_progress=lambda *_: None, on_message=lambda _: None)
    assert not job.plan.exists()


@needs_rtx
def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    job = _matmul_job(tmp_path)
    job.graph.write_bytes(b"no graph")
    with pytest.raises(BuildError, match=r"chain\.onnx"):
        compile_in_process(job, on_progress=lambda *_: None, on_message=lambda _: None)


@needs_rtx
def test_the_builder_stops_when_it_is_cancelled(tmp_path: Path) -> None:
    job = _matmul_job(tmp_path)
    steps: list[str] = []
    with pytest.raises(BuildError, match="cancelled"):
        compile_plan(
            job,
            on_progress=lambda _, phase: steps.append(phase),
            on_message=lambda _: None,
            cancelled=lambda: True,
        )
    cancelled_after = len(steps)
    compile_plan(
        job,
        on_progress=lambda _, phase: steps.append(phase),
        on_message=lambda _: None,
        cancelled=lambda: False,
    )
    assert cancelled_after < len(steps) - cancelled_after
    job.plan.unlink()


@needs_rtx
def test_an_interrupt_ends_the_compiling_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = _watch_processes(monkeypatch)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_in_process(
            _matmul_job(tmp_path, layers=200), on_progress=interrupt, on_message=lambda _: None
        )
    (process,) = started
    assert process.poll() is not None
    assert not (tmp_path / "chain.plan").exists()


@needs_rtx
def test_a_killed_process_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = _watch_processes(monkeypatch)

    def kill(*_: object) -> None:
        os.kill(started[0].pid, signal.SIGKILL)

    with pytest.raises(BuildError, match="out of memory"):
        compile_in_process(
            _matmul_job(tmp_path, layers=200), on_progress=kill, on_message=lambda _: None
        )
    assert not (tmp_path / "chain.plan").exists()


def _watch_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    started: list[subprocess.Popen[str]] = []
    original = subprocess.Popen

    def popen(*arguments: object, **options: object) -> subprocess.Popen[str]:
        started.append(original(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr("framesink.build.plans.process.subprocess.Popen", popen)
    return started
