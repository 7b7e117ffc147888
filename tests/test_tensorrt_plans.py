"""Which TensorRT package and which plans the executor takes, and what it says of others."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from reference.tensorrt_bundle import add_plans, plan_spec

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError
from framesink.runtime.executors import DATA_CENTER_SMS, create_executor
from framesink.runtime.executors.needs import missing_names
from framesink.runtime.executors.tensorrt.contract import Package, load_api, needs
from framesink.runtime.executors.tensorrt.interface import check_plan
from framesink.runtime.executors.tensorrt.support import find_plans, why_not_tensorrt
from framesink.runtime.manifest import PartName, PlanSpec, TensorSpec

torch = pytest.importorskip("torch", reason="the executor keeps its memory in torch")

from fake import gpu_machine  # noqa: E402
from fake import tensorrt as stand_in  # noqa: E402

# Names of the package.


@pytest.mark.parametrize("package", ["tensorrt_rtx", "tensorrt"])
def test_every_name_that_is_used_exists(package: Package) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    assert [name for need in needs(package) for name in missing_names(need)] == []
    assert load_api(package).__name__ == package


def test_the_stand_in_has_no_name_that_the_package_lacks() -> None:
    real: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    own = {"spec", "logger", "graph", "tensors", "contexts", "engine", "runs", "strategy"}
    for owner in stand_in.NAMES:
        names = {name for name in vars(owner) if not name.startswith("_")}
        assert names - own <= set(dir(getattr(real, owner.__name__))), owner


def test_a_package_that_lacks_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = stand_in.as_module("tensorrt_rtx", "0.9")
    del module.CudaGraphStrategy
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    with pytest.raises(BundleError, match=r"tensorrt_rtx 0\.9 lacks .*CudaGraphStrategy"):
        load_api("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BundleError, match="cannot be imported here"):
        load_api("tensorrt_rtx")


# Which plan, which executor.


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = add_plans(tiny_bundle, tmp_path_factory.mktemp("plans") / "bundle")
    return Bundle.open(directory, check="sizes")


def with_plans(bundle: Bundle, *choices: tuple[str, str, str]) -> Bundle:
    """The bundle with a plan of each part for every builder, version and SM."""
    manifest = bundle.manifest
    parts: dict[PartName, Any] = {}
    for part in ("language_model", "vision_encoder"):
        plans = tuple(
            plan_spec(manifest, part, builder, sm).model_copy(update={"builder_version": version})
            for builder, version, sm in choices
        )
        parts[part] = manifest.part(part).model_copy(update={"plans": plans})
    return Bundle(bundle.directory, manifest.model_copy(update=parts))


def test_the_plan_is_that_of_the_gpu_and_the_installed_version(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    gpu_machine.install(monkeypatch, "tensorrt_rtx", version="1.7.1.999", sm="sm86")
    several = with_plans(
        bundle,
        ("tensorrt_rtx", "1.7.1.116", "sm89"),
        ("tensorrt", "10.15.1", "sm86"),
        ("tensorrt_rtx", "1.6.0.1", "sm86"),
        ("tensorrt_rtx", "1.7.1.116", "sm86"),
    )
    plans = find_plans(several)
    for plan in (plans.language_model, plans.vision_encoder):
        assert (plan.builder, plan.builder_version) == ("tensorrt_rtx", "1.7.1.116")
        assert plan.targets == ("sm86",)


@pytest.mark.parametrize(
    ("choices", "sm", "sentence"),
    [
        ([], "sm89", "built without TensorRT plans"),
        ([("tensorrt_rtx", "1.7.1.116", "sm89")], None, "this machine has none"),
        ([("tensorrt_rtx", "1.7.1.116", "sm89")], "sm90", "no vision_encoder plan for sm90"),
        ([("tensorrt_rtx", "1.6.0.1", "sm89")], "sm89", r"1\.6\.0\.1 but 1\.7\.1\.116"),
        ([("tensorrt", "10.15.1", "sm89")], "sm89", r"needs tensorrt 10\.15\.1, which is not"),
    ],
)
def test_why_no_plan_fits(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    choices: list[tuple[str, str, str]],
    sm: str | None,
    sentence: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    gpu_machine.install(monkeypatch, "tensorrt_rtx", sm=sm)
    with pytest.raises(BundleError, match=sentence) as caught:
        find_plans(with_plans(bundle, *choices))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_torch_with_cuda_is_needed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_machine.install(monkeypatch, "tensorrt_rtx")
    assert why_not_tensorrt(bundle) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA" in (why_not_tensorrt(bundle) or "")
    monkeypatch.setattr("framesink.runtime.executors.tensorrt.support.find_spec", lambda name: None)
    assert "torch, which is not installed" in (why_not_tensorrt(bundle) or "")


@pytest.mark.parametrize("sm", ["sm89", *DATA_CENTER_SMS])
@pytest.mark.parametrize("can_cuda", [True, False])
@pytest.mark.parametrize("has_plan", [True, False])
def test_what_auto_chooses(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, sm: str, can_cuda: bool, has_plan: bool
) -> None:
    gpu_machine.install(monkeypatch, "tensorrt_rtx", sm=sm)
    given = with_plans(bundle, ("tensorrt_rtx", stand_in.VERSION, sm if has_plan else "sm75"))

    class Made(Exception):
        """Which executor would have been loaded."""

    def refuse(name: str) -> Callable[..., None]:
        def from_bundle(*arguments: object, **options: object) -> None:
            raise Made(name)

        return from_bundle

    from framesink.runtime.executors.cuda.executor import CudaExecutor
    from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor
    from framesink.runtime.executors.tensorrt.executor import TensorRTExecutor

    for kind in (CudaExecutor, OnnxRuntimeExecutor, TensorRTExecutor):
        monkeypatch.setattr(kind, "from_bundle", refuse(kind.name))
    obstacle = None if can_cuda else "it is broken"
    monkeypatch.setattr("framesink.runtime.executors.why_not_cuda", lambda manifest: obstacle)
    order = ["cuda", "tensorrt"] if sm in DATA_CENTER_SMS else ["tensorrt", "cuda"]
    able = {"cuda": can_cuda, "tensorrt": has_plan}
    expected = next((name for name in order if able[name]), "onnxruntime")
    with pytest.raises(Made, match=expected):
        create_executor(given, num_pages=8)


def test_auto_says_why_no_gpu_executor_runs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_machine.install(monkeypatch, "tensorrt_rtx", sm="sm90")
    monkeypatch.setattr("framesink.runtime.executors.why_not_cuda", lambda manifest: "it is broken")
    executor, why = create_executor(bundle, num_pages=8, threads=1)
    assert executor.name == "onnxruntime"
    assert "the cuda executor cannot run: it is broken; nor can tensorrt" in why
    assert "no vision_encoder plan for sm90" in why


# Plans against the manifest.


def test_the_plans_that_a_build_makes_pass(bundle: Bundle) -> None:
    for part in ("language_model", "vision_encoder"):
        check_plan(bundle.manifest, part, bundle.manifest.part(part).plans[0])


def edited(specs: Sequence[TensorSpec], name: str, **change: Any) -> tuple[TensorSpec, ...]:
    assert name in {value.name for value in specs}
    return tuple(
        value.model_copy(update=change) if value.name == name else value for value in specs
    )


def narrowed(plan: PlanSpec, name: str, **change: Any) -> tuple[Any, ...]:
    """The profiles with other bounds of an input in the last."""
    *first, last = plan.profiles
    bounds = last.inputs[name].model_copy(update=change)
    return (*first, last.model_copy(update={"inputs": {**last.inputs, name: bounds}}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: {"inputs": p.inputs[1:]}, "the input inputs_embeds is missing"),
        (lambda p: {"outputs": p.outputs[1:]}, "is missing"),
        (
            lambda p: {"inputs": (*p.inputs, TensorSpec(name="x", dtype="int8", shape=(1,)))},
            "the input x is unknown",
        ),
        (
            lambda p: {"inputs": edited(p.inputs, "k_pages.1", shape=("pool", 2, 8, 16))},
            r"its input k_pages\.1 is float32 \['pool', 2, 8, 16\]",
        ),
        (lambda p: {"inputs": edited(p.inputs, "mask", dtype="bool")}, "its input mask is bool"),
        (
            lambda p: {"outputs": edited(p.outputs, "v_new.0", dtype="float16")},
            r"its output v_new\.0 is float16",
        ),
        (lambda p: {"profiles": p.profiles[::-1]}, "its profiles are not prefill and decode"),
        (lambda p: {"profiles": narrowed(p, "last", minimum=(0,))}, "no such sizes of last"),
        (lambda p: {"profiles": narrowed(p, "last", maximum=(1, 1))}, "another number of dimens"),
        (
            lambda p: {"profiles": narrowed(p, "inputs_embeds", maximum=(16, 1, 128))},
            "no such sizes of inputs_embeds",
        ),
    ],
)
def test_a_plan_that_is_not_the_models_is_refused(
    bundle: Bundle, change: Callable[[PlanSpec], dict[str, Any]], sentence: str
) -> None:
    plan = bundle.manifest.language_model.plans[0]
    with pytest.raises(BundleError, match=sentence):
        check_plan(bundle.manifest, "language_model", plan.model_copy(update=change(plan)))


def test_codes_of_fp8_are_bytes_in_pages(bundle: Bundle) -> None:
    plan = bundle.manifest.language_model.plans[0]

    def typed(pages: str, rows: str) -> PlanSpec:
        inputs = [
            value.model_copy(update={"dtype": pages}) if "_pages." in value.name else value
            for value in plan.inputs
        ]
        outputs = [
            value.model_copy(update={"dtype": rows}) if "_new." in value.name else value
            for value in plan.outputs
        ]
        return plan.model_copy(update={"inputs": tuple(inputs), "outputs": tuple(outputs)})

    for rows in ("int8", "float8_e4m3fn"):
        check_plan(bundle.manifest, "language_model", typed("int8", rows))
    for pages, rows in [("int8", "float16"), ("float8_e4m3fn", "float8_e4m3fn")]:
        with pytest.raises(BundleError, match="does not fit the manifest"):
            check_plan(bundle.manifest, "language_model", typed(pages, rows))
