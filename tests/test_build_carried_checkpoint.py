"""The checkpoint for TensorRT-LLM that a bundle carries: written, listed, hashed, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from framesink.build.carried_checkpoint import CHECKPOINT_DIRECTORY
from framesink.build.options import BuildOptions
from framesink.build.pipeline import build_bundle
from framesink.build.reporter import BuildSummary, SilentReporter
from framesink.calibration.quantize import quantize_checkpoint
from framesink.calibration.recipe import Recipe
from framesink.cli.main import framesink
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BuildError, BundleError
from framesink.runtime.executors.tensorrt_llm.checkpoint import (
    DESCRIPTION_NAME,
    require_model_of,
    require_readable,
)
from framesink.runtime.models.checkpoint import Checkpoint, read_json


@pytest.fixture
def build(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Bundle, BuildSummary]]:
    def make(**options: Any) -> tuple[Bundle, BuildSummary]:
        output = tmp_path / "bundle"
        wanted = BuildOptions(
            tiny_checkpoint, output, plans=False, with_checkpoint=True, judge=False, **options
        )
        summary = build_bundle(wanted, SilentReporter())
        return Bundle.open(output), summary

    return make


Build = Callable[..., tuple[Bundle, BuildSummary]]


def carried(bundle: Bundle) -> Path:
    directory = bundle.checkpoint()
    assert directory is not None
    assert directory == bundle.directory / CHECKPOINT_DIRECTORY
    require_readable(directory)
    require_model_of(bundle, directory)
    return directory


def test_16_bit_weights_are_those_of_the_source(build: Build, tiny_checkpoint: Path) -> None:
    bundle, _ = build()
    found, source = Checkpoint.open(carried(bundle)), Checkpoint.open(tiny_checkpoint)
    assert found.quantization is None
    assert found.names() == source.names()
    assert all(np.array_equal(found.read(name), source.read(name)) for name in source.names())


def test_it_is_quantized_as_far_as_it_can_be_read(build: Build) -> None:
    bundle, summary = build(precision="int8-weight-only", vision_precision="int8-weight-only")
    assert bundle.manifest.vision_encoder.precision == "int8-weight-only"
    directory = carried(bundle)
    details = read_json(directory / DESCRIPTION_NAME)["quantization"]
    assert details["quant_algo"] == "W8A16"
    assert "visual*" in details["exclude_modules"]
    (note,) = [note for note in summary.notes if "TensorRT-LLM" in note]
    assert "does not load a quantized vision encoder" in note


def test_a_changed_or_added_file_is_refused(build: Build) -> None:
    bundle, _ = build()
    config = carried(bundle) / "config.json"
    text = config.read_text()
    config.write_text(text.replace("silu", "gelu", 1))
    with pytest.raises(BundleError, match=r"checkpoint/config\.json .* has changed"):
        Bundle.open(bundle.directory)
    config.write_text(text)
    (config.parent / "modeling.py").write_text("")
    with pytest.raises(BundleError, match=r"holds checkpoint/modeling\.py, which its manifest"):
        Bundle.open(bundle.directory).checkpoint()


def test_a_manifest_must_list_what_it_carries(build: Build) -> None:
    bundle, _ = build()
    path = bundle.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["checkpoint/config.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"uses checkpoint/config\.json without listing"):
        Bundle.open(bundle.directory)


def test_a_source_it_does_not_read_is_refused_at_once(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "quantized"
    recipe = Recipe(language_model="int8-weight-only")
    quantize_checkpoint(Checkpoint.open(tiny_checkpoint), None, recipe, source)
    options = BuildOptions(source, tmp_path / "bundle", plans=False, with_checkpoint=True)
    with pytest.raises(BuildError, match=r"cannot carry .* own layout.*--layout tensorrt-llm"):
        build_bundle(options, SilentReporter())
    assert not (tmp_path / "bundle").exists()


def test_the_command_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    command = ["build", str(source), "-o", str(tmp_path / "bundle"), "--no-plans"]
    result = CliRunner().invoke(framesink, [*command, "--with-checkpoint"])
    assert result.exit_code == 0, result.output
    carried(Bundle.open(tmp_path / "bundle"))
    shown = CliRunner().invoke(framesink, ["inspect", str(tmp_path / "bundle")])
    assert "checkpoint/, for TensorRT-LLM" in shown.output
