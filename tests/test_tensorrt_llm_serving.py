"""A real Triton server with `tensorrt_llm`, here its stand-in, under `language_model`."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from serving_server import RunningServer, start_server

pytest.importorskip("pytriton", reason="the server's wheel is not installed")
pytest.importorskip("transformers", reason="the stand-in runs on transformers")

from fake import tensorrt_llm as stand_in
from fake.tensorrt_llm_engine import demo_clip

from framesink.client import SessionSettings, connect
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import FramesinkError
from framesink.serving.layout import Layout

TESTS = Path(__file__).parent
CHUNKS = 6


@pytest.fixture
def server(
    carrying_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningServer]:
    """The stand-in is a package that only the language model's process finds."""
    package = tmp_path / "tensorrt_llm"
    (package / "inputs").mkdir(parents=True)
    everything = "from fake.tensorrt_llm import *\nfrom fake.tensorrt_llm import VERSION\n"
    for module in ("__init__", "llmapi", "inputs/__init__", "inputs/utils"):
        (package / f"{module}.py").write_text(f"{everything}__version__ = VERSION\n")
    write = Layout.write

    def write_with_stand_in(layout: Layout, configs: object) -> None:
        write(layout, configs)  # type: ignore[arg-type]
        model = layout.repository / "language_model" / "1" / "model.py"
        paths = [str(tmp_path), str(TESTS)]
        model.write_text(f"import sys\nsys.path[:0] = {paths}\n{model.read_text()}")

    monkeypatch.setattr(Layout, "write", write_with_stand_in)
    with start_server(carrying_bundle, executor="tensorrt_llm") as running:
        yield running


def test_a_client_gets_what_the_local_runtime_says(
    server: RunningServer, carrying_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.supervisor.engine.executor_reason.startswith("tensorrt_llm 1.2.0 on the GPU")
    chunks = demo_clip()[:CHUNKS]
    behaviour = stand_in.install(monkeypatch)
    local = []
    with StreamingEngine.load(carrying_bundle, "tensorrt_llm", threaded=False) as engine:
        session = engine.open_session()
        for chunk in chunks:
            session.push_chunk(chunk)
            local += [(event.turn, event.kind, event.tokens) for event in session if event.final]
    assert len(behaviour.prompts) == CHUNKS + 1
    served = []
    settings = SessionSettings(frame_format="png")
    with connect(server.url) as client, client.session(settings=settings) as remote:
        coming = iter(remote)
        for chunk in chunks:
            remote.push_chunk(chunk)
            event = next(event for event in coming if event.final)
            served.append((event.turn, event.kind, event.tokens))
    assert served == local


@pytest.mark.skipif(find_spec("tensorrt_llm") is not None, reason="the package is installed")
def test_without_the_package_the_server_ends_in_one_sentence(
    carrying_bundle: Path,
) -> None:
    with (
        pytest.raises(FramesinkError, match="needs the package tensorrt_llm"),
        start_server(carrying_bundle, executor="tensorrt_llm"),
    ):
        pass
