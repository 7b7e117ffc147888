"""Opening a bundle: whole ones open, damaged and hostile ones are refused in one sentence."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError
from framesink.runtime.manifest import (
    Manifest,
    OptimizationProfile,
    PlanSpec,
    ProfileShape,
    TensorSpec,
)

PLAN = PlanSpec(
    path="plans/language_model.sm89.plan",
    builder="tensorrt_rtx",
    builder_version="1.7.1.116",
    targets=("sm86", "sm89"),
    compute_type="float16",
    inputs=(TensorSpec(name="x", dtype="float16", shape=("batch", 4)),),
    outputs=(),
    profiles=(
        OptimizationProfile(
            name="prefill",
            inputs={"x": ProfileShape(minimum=(1, 4), optimum=(2, 4), maximum=(8, 4))},
        ),
    ),
)


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    directory = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, directory)
    return directory


def _edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _refusal(directory: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(directory)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def _with_plan(bundle: Bundle) -> Bundle:
    part = bundle.manifest.language_model.model_copy(update={"plans": (PLAN,)})
    manifest = bundle.manifest.model_copy(update={"language_model": part})
    return Bundle(bundle.directory, manifest)


def test_a_bundle_is_what_its_checkpoint_was(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    text = "Time=1.0-2.0s é <|im_end|>"
    expected = AutoTokenizer.from_pretrained(tiny_checkpoint)(text, add_special_tokens=False)
    assert bundle.tokenizer().encode(text) == expected["input_ids"]
    (system_end,) = bundle.tokenizer().encode("<|im_end|>")
    assert system_end in bundle.protocol().system
    weights = load_file(bundle.path("weights.safetensors"))
    original = load_file(tiny_checkpoint / "model.safetensors")
    assert len(weights) == len(original)
    for name, tensor in original.items():
        canonical = name.replace("model.language_model.", "model.").replace(
            "model.visual", "visual"
        )
        np.testing.assert_array_equal(weights[canonical], tensor.astype(np.float16))


def test_a_manifest_survives_its_own_json(tiny_bundle: Path) -> None:
    manifest = Bundle.open(tiny_bundle, check="sizes").manifest
    assert Manifest.model_validate_json(manifest.model_dump_json(), strict=True) == manifest


def test_every_file_of_a_bundle_is_listed(tiny_bundle: Path) -> None:
    listed = set(Bundle.open(tiny_bundle).manifest.files) | {"manifest.json"}
    present = {
        path.relative_to(tiny_bundle).as_posix()
        for path in tiny_bundle.rglob("*")
        if path.is_file()
    }
    assert present == listed


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_changed_byte_anywhere_is_found(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("changed") / "bundle"
    shutil.copytree(tiny_bundle, directory)
    files = sorted(path for path in directory.rglob("*") if path.name != "manifest.json")
    path = data.draw(st.sampled_from([path for path in files if path.is_file()]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert path.name in _refusal(directory)
    assert Bundle.open(directory, check="sizes").directory == directory


def test_missing_and_truncated_files_are_named(copy: Path) -> None:
    weights = copy / "weights.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size - 1)
    message = _refusal(copy)
    assert "weights.safetensors" in message
    assert "truncated" in message
    assert str(size) in message
    weights.unlink()
    assert "weights.safetensors is missing" in _refusal(copy)


def test_no_bundle_and_no_manifest(tmp_path: Path) -> None:
    assert "build-engines" in _refusal(tmp_path / "nowhere")
    assert "manifest.json" in _refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"nul", b"[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_no_manifest(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    assert "manifest.json" in _refusal(copy)


def test_a_manifest_of_a_later_version(copy: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["schema_version"] = 2
        content["something_new"] = True

    _edit_manifest(copy, change)
    assert "schema version 2" in _refusal(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [("page_size", "16"), ("page_size", 0), ("unknown_field", 1), ("weights", "weights")],
)
def test_a_manifest_is_read_strictly(copy: Path, field: str, value: object) -> None:
    _edit_manifest(copy, lambda content: content.update({field: value}))
    assert field in _refusal(copy)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "plans/../../outside", "a\\b", "", ".", "./x", "a//b"]
)
def test_file_names_cannot_leave_the_bundle(copy: Path, name: str) -> None:
    (copy.parent / "outside").write_bytes(b"x")

    def change(content: dict[str, Any]) -> None:
        content["files"][name] = {"size": 1, "sha256": "0" * 64}

    _edit_manifest(copy, change)
    assert "path inside the bundle" in _refusal(copy)


@pytest.mark.parametrize("whole_directory", [False, True])
def test_links_are_refused(copy: Path, tmp_path: Path, whole_directory: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = outside / "secret"
    secret.write_bytes(b"x")
    if whole_directory:
        (copy / "plans").symlink_to(outside)
        name = "plans/secret"
    else:
        (copy / "linked").symlink_to(secret)
        name = "linked"

    def change(content: dict[str, Any]) -> None:
        content["files"][name] = {"size": 1, "sha256": "0" * 64}

    _edit_manifest(copy, change)
    assert "is a link" in _refusal(copy)


def test_files_in_use_must_be_listed(copy: Path) -> None:
    _edit_manifest(copy, lambda content: content["files"].pop("language_model.onnx"))
    assert "language_model.onnx" in _refusal(copy)


def test_only_listed_files_have_a_path(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    assert bundle.path("tokenizer.json").is_file()
    with pytest.raises(BundleError, match=r"no file manifest\.json"):
        bundle.path("manifest.json")


def test_the_plan_of_an_architecture(tiny_bundle: Path) -> None:
    bundle = _with_plan(Bundle.open(tiny_bundle, check="sizes"))
    assert bundle.plan_for("language_model", "sm86") == PLAN
    with pytest.raises(BundleError, match=r"sm120.*sm86, sm89.*--target sm120"):
        bundle.plan_for("language_model", "sm120")
    with pytest.raises(BundleError, match="without TensorRT plans"):
        bundle.plan_for("vision_encoder", "sm89")


def test_no_plan_without_a_gpu(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framesink.runtime.bundle.current_sm", lambda: None)
    bundle = _with_plan(Bundle.open(tiny_bundle, check="sizes"))
    with pytest.raises(BundleError, match="onnxruntime executor"):
        bundle.plan_for("language_model")
    monkeypatch.setattr("framesink.runtime.bundle.current_sm", lambda: "sm89")
    assert bundle.plan_for("language_model") == PLAN


@pytest.mark.parametrize(
    ("installed", "reason"),
    [("1.7.1.200", None), ("1.8.0.5", "1.8.0.5 is installed"), (None, "not installed")],
)
def test_a_plan_needs_the_version_that_built_it(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, reason: str | None
) -> None:
    module = None
    if installed is not None:
        module = ModuleType("tensorrt_rtx")
        module.__version__ = installed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    bundle = Bundle.open(tiny_bundle, check="sizes")
    if reason is None:
        bundle.check_version(PLAN)
    else:
        with pytest.raises(BundleError, match=reason):
            bundle.check_version(PLAN)
