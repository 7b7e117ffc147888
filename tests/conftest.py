"""Fixtures shared by all tests: a tiny checkpoint and the engine bundle built from it."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reference.tiny_checkpoint import write_tiny_checkpoint

if TYPE_CHECKING:
    from fake.tensorrt_llm import Behaviour
    from fake.tensorrt_llm_engine import MakeEngine
    from fake.triton_service import FakeTriton
    from serving_server import RunningServer
    from transformers import Qwen2_5_VLForConditionalGeneration

    from framesink.client import Client
    from framesink.runtime.manifest import ComputeType

# The models are tiny: threads that spin for each other cost ten times what they bring, above all
# where tests run side by side. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Qwen2.5-VL checkpoint of about 0.2 M parameters, in float32."""
    pytest.importorskip("transformers", reason="transformers writes the tiny checkpoint")
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> "Qwen2_5_VLForConditionalGeneration":
    """The tiny checkpoint in transformers, in float64, with plain attention."""
    from reference.dense_model import load_model

    return load_model(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_bundle_with_pages(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Engine bundles of the tiny checkpoint, without plans, by page size and, if it is not to be
    float32, by the type ONNX Runtime computes in."""
    from framesink.build.options import BuildOptions
    from framesink.build.pipeline import build_bundle
    from framesink.build.reporter import SilentReporter

    @cache
    def build(page_size: int, executed_type: "ComputeType" = "float32") -> Path:
        output = tmp_path_factory.mktemp("bundles") / f"{executed_type}-pages-of-{page_size}"
        options = BuildOptions(
            tiny_checkpoint,
            output,
            plans=False,
            executed_type=executed_type,
            page_size=page_size,
            max_streams=16,
            max_context=4096,
        )
        build_bundle(options, SilentReporter())
        return output

    return build


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle_with_pages: Callable[..., Path]) -> Path:
    """The engine bundle of the tiny checkpoint with pages of 16 rows."""
    return tiny_bundle_with_pages(16)


def _demo_model() -> Path:
    model = Path(__file__).parents[1] / "demo" / "model"
    if not model.is_dir():
        pytest.skip("the demo model is not in this checkout")
    return model


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine bundle of the demo model, without plans, for up to 48 sessions."""
    from framesink.build.options import BuildOptions
    from framesink.build.pipeline import build_bundle
    from framesink.build.reporter import SilentReporter

    output = tmp_path_factory.mktemp("demo") / "bundle"
    build_bundle(BuildOptions(_demo_model(), output, plans=False, max_streams=48), SilentReporter())
    return output


@pytest.fixture(scope="session")
def carrying_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine bundle of the demo model, in float32, with a checkpoint for TensorRT-LLM."""
    from framesink.build.options import BuildOptions
    from framesink.build.pipeline import build_bundle
    from framesink.build.reporter import SilentReporter

    output = tmp_path_factory.mktemp("carrying") / "bundle"
    options = BuildOptions(
        _demo_model(),
        output,
        plans=False,
        executed_type="float32",
        max_streams=16,
        with_checkpoint=True,
    )
    build_bundle(options, SilentReporter())
    return output


@pytest.fixture
def tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> "Behaviour":
    """The stand-in of TensorRT-LLM in the place of the package: what it does, and what it saw."""
    pytest.importorskip("transformers", reason="the stand-in runs on transformers")
    from fake.tensorrt_llm import install

    return install(monkeypatch)


@pytest.fixture
def make_tensorrt_llm_engine(
    carrying_bundle: Path, tensorrt_llm: "Behaviour"
) -> "Iterator[MakeEngine]":
    """Makes engines of the demo model over the stand-in, which are closed at the end."""
    from fake.tensorrt_llm_engine import tensorrt_llm_engines

    with tensorrt_llm_engines(carrying_bundle) as make:
        yield make


@pytest.fixture
def fake_triton() -> "Iterator[FakeTriton]":
    """A server that follows the contract over scripted sessions, in this process."""
    from fake.triton_service import FakeTriton

    service = FakeTriton()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def fake_triton_client(fake_triton: "FakeTriton") -> "Iterator[Client]":
    """A client of it."""
    from framesink.client import connect

    with connect(fake_triton.url, timeout=2.0) as connected:
        yield connected


@pytest.fixture(scope="session")
def demo_server(demo_bundle: Path) -> "Iterator[RunningServer]":
    """A Triton Inference Server with the demo bundle. Tests that end it start their own."""
    pytest.importorskip("pytriton", reason="nvidia-pytriton carries the server")
    from serving_server import start_server

    with start_server(demo_bundle) as server:
        yield server
