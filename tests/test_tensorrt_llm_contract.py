"""What is used of TensorRT-LLM, held against the recorded description of its API."""

import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the stand-in runs on transformers")

from fake import tensorrt_llm as stand_in
from fake.engine import LIMITS, make_frames, make_protocol

from framesink.runtime.errors import FramesinkError
from framesink.runtime.executors.needs import Kind, Need
from framesink.runtime.executors.tensorrt_llm.contract import (
    NEEDS,
    VIDEO_DATA_MODULES,
    VIDEO_DATA_PARAMETERS,
    Api,
    load_api,
)
from framesink.runtime.executors.tensorrt_llm.executor import TensorRTLLMExecutor, load_llm
from framesink.runtime.executors.tensorrt_llm.options import TensorRTLLMOptions
from framesink.runtime.prompting.executor import ReplyRequest
from framesink.runtime.prompting.prompt import Prompt, Video
from framesink.runtime.sampler import SamplingParams

RECORDED: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parent / "reference" / "tensorrt_llm_api.json").read_text()
)
EVERY_NAME = [(need, name) for need in NEEDS for name in need.names]


def find(path: str) -> Any:
    """What a recorded path names."""
    parts = path.split(".")
    depth = max(d for d in range(1, len(parts)) if ".".join(parts[:d]) in sys.modules)
    found: Any = import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: f"{need.owner} {need.kind}")
def test_what_is_needed_is_recorded(need: Need) -> None:
    path = f"{need.module}.{need.owner}"
    assert need.owner.split(".")[0] in RECORDED["modules"][need.module]
    assert set(need.names) <= set(RECORDED[need.kind.value][path])


def test_video_data_is_recorded() -> None:
    (module,) = set(VIDEO_DATA_MODULES) & RECORDED["modules"].keys()
    assert set(VIDEO_DATA_PARAMETERS) <= set(RECORDED["parameters"][f"{module}.VideoData"])


def test_the_stand_in_is_what_is_recorded(tensorrt_llm: stand_in.Behaviour) -> None:
    for module, names in RECORDED["modules"].items():
        public = {name for name in vars(sys.modules[module]) if not name.startswith("__")}
        assert public | {"__version__"} == {*names, "__version__"}
    for path, names in RECORDED["parameters"].items():
        assert list(inspect.signature(find(path)).parameters) == names, path
    for path, names in RECORDED["fields"].items():
        assert list(find(path).model_fields) == names, path
    for path, names in RECORDED["attributes"].items():
        owner = find(path)
        bases = dir(object)
        own = {name for name in dir(owner) if not name.startswith("_") and name not in bases}
        own |= set(inspect.get_annotations(owner))
        recorded = {name for name in names if not name.startswith("__")}
        assert own - {"behaviour", "is_down"} == recorded, path
        assert all(hasattr(owner, name) for name in names if name.startswith("__")), path
    assert [field.name for field in fields(find("tensorrt_llm.SamplingParams"))] == RECORDED[
        "parameters"
    ]["tensorrt_llm.SamplingParams"]


def test_an_installed_one_with_everything_is_taken(tensorrt_llm: stand_in.Behaviour) -> None:
    api = load_api()
    assert api.version == stand_in.VERSION
    assert api.llm is stand_in.LLM
    assert api.video_data is stand_in.VideoData


@pytest.mark.parametrize(
    ("need", "name"), EVERY_NAME, ids=[f"{need.owner} {name}" for need, name in EVERY_NAME]
)
def test_each_missing_name_is_named(
    tensorrt_llm: stand_in.Behaviour, monkeypatch: pytest.MonkeyPatch, need: Need, name: str
) -> None:
    owner = find(f"{need.module}.{need.owner}")
    match need.kind:
        case Kind.FIELDS:
            fields = {n: field for n, field in owner.__pydantic_fields__.items() if n != name}
            monkeypatch.setattr(owner, "__pydantic_fields__", fields)
        case Kind.PARAMETERS:
            kept = [p for p in inspect.signature(owner).parameters.values() if p.name != name]
            monkeypatch.setattr(owner, "__signature__", inspect.Signature(kept), raising=False)
        case Kind.ATTRIBUTES:
            if name in vars(owner):
                monkeypatch.delattr(owner, name)
            if name in inspect.get_annotations(owner):
                monkeypatch.delitem(owner.__annotations__, name)
    with pytest.raises(FramesinkError) as caught:
        load_api()
    sentence = str(caught.value)
    assert f"{need.owner}({name})" in sentence or f"{need.owner}.{name}" in sentence
    assert stand_in.VERSION in sentence
    assert "1.2.x" in sentence


@pytest.mark.parametrize("name", ["KvCacheConfig", "RequestOutput"])
def test_a_missing_class_is_named(
    tensorrt_llm: stand_in.Behaviour, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(sys.modules["tensorrt_llm.llmapi"], name)
    with pytest.raises(FramesinkError, match=rf"lacks tensorrt_llm\.llmapi\.{name}\b"):
        load_api()


def test_video_data_may_be_at_its_later_place(
    tensorrt_llm: stand_in.Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = VIDEO_DATA_MODULES
    module = sys.modules[early]
    monkeypatch.setitem(sys.modules, early, None)
    with pytest.raises(FramesinkError, match=r"lacks .*VideoData or .*VideoData"):
        load_api()
    monkeypatch.setitem(sys.modules, late, module)
    assert load_api().video_data is stand_in.VideoData


def test_where_it_is_not_installed_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(FramesinkError, match=r"needs the package tensorrt_llm .*not installed;"):
        load_api()


def test_one_that_cannot_be_imported_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FramesinkError, match=r"cannot be imported here \(OSError: libcuda"):
        load_api()


class Only:
    """Another object, of which only some attributes may be used; `used` gets those that were."""

    def __init__(self, target: Any, names: set[str], used: set[str]) -> None:
        self._target, self._names, self._used = target, names, used

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(name)
        self._used.add(name)
        return getattr(self._target, name)


class OnlyOutput(Only):
    """A request's output, which goes through its tokens one by one."""

    def __iter__(self) -> Iterator["OnlyOutput"]:
        self._used.update(("__iter__", "__next__"))
        assert self._target.wait(60.0)
        for token in (1, 2, 3):
            self._target.outputs[0]._target.token_ids.append(token)
            yield self
        self._target.outputs[0]._target.finish_reason = "length"
        yield self


def test_nothing_else_is_used() -> None:
    """A whole life of the executor over objects that refuse every name that is not looked for; and
    every name that is looked for is used."""
    needed = {(need.owner, need.kind): set(need.names) for need in NEEDS}
    used: dict[tuple[str, Kind], set[str]] = {key: set() for key in needed}

    def call(*keys: tuple[str, Kind], gives: Callable[..., Any]) -> Callable[..., Any]:
        def check(**given: Any) -> Any:
            assert set(given) <= set().union(*(needed[key] for key in keys))
            for key in keys:
                used[key].update(given.keys() & needed[key])
            return gives(**given)

        return check

    def only(owner: str, target: Any, kind: type[Only] = Only) -> Only:
        key = (owner, Kind.ATTRIBUTES)
        return kind(target, needed[key], used[key])

    aborted: list[bool] = []
    go = threading.Event()
    go.set()

    def generate(**given: Any) -> Only:
        (shown,) = given["inputs"]["multi_modal_data"]["video"]
        assert shown.keys() == set(VIDEO_DATA_PARAMETERS)
        completion = only("CompletionOutput", SimpleNamespace(token_ids=[], finish_reason=None))
        output = SimpleNamespace(
            outputs=[completion],
            prompt_token_ids=[0] * 9,
            abort=lambda: aborted.append(True),
            wait=go.wait,
        )
        return only("RequestOutput", output, OnlyOutput)

    llm = SimpleNamespace(
        generate_async=call(("LLM.generate_async", Kind.PARAMETERS), gives=generate),
        shutdown=lambda: None,
    )
    parameters = Kind.PARAMETERS
    api = Api(
        version="1.2.0",
        llm=call(
            ("LLM", parameters), ("TorchLlmArgs", Kind.FIELDS), gives=lambda **_: only("LLM", llm)
        ),
        sampling_params=call(("SamplingParams", parameters), gives=dict),
        kv_cache_config=call(("KvCacheConfig", Kind.FIELDS), gives=dict),
        video_data=dict,
    )
    options, protocol = TensorRTLLMOptions(), make_protocol()
    loaded = load_llm(api, Path("checkpoint"), options, LIMITS, 4)
    executor = TensorRTLLMExecutor(api, loaded, options, protocol)
    video = Video(make_frames(0), 2.0, 2)
    prompt = Prompt("<|video_pad|>", (protocol.video_pad,), (video,))
    for sampling in (SamplingParams(), SamplingParams(0.9, 40, 0.8, 1.1, 7)):
        request = ReplyRequest("session", prompt, sampling, 3, protocol.stop_tokens)
        generation = executor.generate(request, lambda: None)
        assert generation.wait(60.0)
        assert (generation.take(), generation.failure) == ([1, 2, 3], None)
        assert generation.prompt_tokens == 9
    go.clear()
    generation = executor.generate(request, lambda: None)
    generation.cancel()
    go.set()
    assert generation.wait(60.0)
    executor.close()
    assert aborted == [True]
    assert used == needed
