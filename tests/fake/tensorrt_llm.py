"""A stand-in of the package `tensorrt_llm`: the recorded API, run by transformers on the CPU.

It has exactly the names that `reference/tensorrt_llm_api.json` records. What the real one is known
to do is done here too: every iteration yields the same object; the `stop_token_ids` are cut off at
the end and `end_id` is not; an abort must be drained; blocks are stored by their tokens, their salt
and, as long as media hashing works, the content of the videos in them.
"""

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from fake.tensorrt_llm_model import Encoded, load_runner

VERSION = "1.2.0"


class RequestError(RuntimeError):
    """What TensorRT-LLM raises for a request that failed."""


class KvCacheConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    tokens_per_block: int = 32
    dtype: str = "auto"


class KvCacheRetentionConfig:
    class TokenRangeRetentionConfig:
        pass


class TorchLlmArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kv_cache_config: KvCacheConfig = KvCacheConfig()
    max_batch_size: int | None = None
    max_num_tokens: int | None = 8192
    max_seq_len: int | None = None
    enable_chunked_prefill: bool = False
    cuda_graph_config: Any = None
    disable_overlap_scheduler: bool = False
    attn_backend: str = "TRTLLM"
    return_perf_metrics: bool = False
    enable_iter_perf_stats: bool = False
    stream_interval: int = 1


@dataclass(kw_only=True)
class SamplingParams:
    max_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    end_id: int | None = None
    pad_id: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    return_perf_metrics: bool = False


class VideoData:
    def __init__(self, frames: list[Any], metadata: dict[str, Any]) -> None:
        self.frames = frames
        self.metadata = metadata


@dataclass
class CompletionOutput:
    text: str = ""
    text_diff: str = ""
    token_ids: list[int] = field(default_factory=list)
    token_ids_diff: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    request_perf_metrics: Any = None


class RequestOutput:
    """Iterating it waits for the request's next token. Its end is an update without a token."""

    outputs: list[CompletionOutput]
    finished: bool
    request_id: int
    prompt_token_ids: list[int]

    def __init__(self, number: int, prompt_token_ids: list[int], stop: set[int]) -> None:
        self.outputs = [CompletionOutput()]
        self.finished = False
        self.request_id = number
        self.prompt_token_ids = prompt_token_ids
        self._stop = stop
        self._updates: queue.Queue[int | str | Exception] = queue.Queue()
        self._aborted = threading.Event()

    def abort(self) -> None:
        self._aborted.set()

    def aborted(self) -> bool:
        return self._aborted.is_set()

    def result(self, timeout: float | None = None) -> "RequestOutput":
        for _ in self:
            pass
        return self

    def __iter__(self) -> "RequestOutput":
        return self

    def __next__(self) -> "RequestOutput":
        if self.finished:
            raise StopIteration
        update = self._updates.get()
        output = self.outputs[0]
        if isinstance(update, Exception):
            self.finished = True
            raise update
        if isinstance(update, int):
            output.token_ids_diff = [update]
            output.token_ids.append(update)
            return self
        self.finished = True
        output.finish_reason = update
        if output.token_ids and output.token_ids[-1] in self._stop:
            output.token_ids.pop()
        return self

    def __aiter__(self) -> Any:
        raise AssertionError("async iteration needs a running loop where the request was made")

    def __anext__(self) -> Any:
        raise AssertionError("async iteration needs a running loop where the request was made")


@dataclass
class Behaviour:
    """What the stand-in is to do, and what it did.

    `hashing` is whether hashing media works; `refuse` and `fail` may return an error for a prompt
    that is submitted, or begun; `before_token` is called before every token of a prompt (the text,
    the number of tokens so far, whether it was aborted).
    """

    hashing: bool = True
    load_error: Exception | None = None
    refuse: Callable[[str], Exception | None] = lambda _: None
    fail: Callable[[str], Exception | None] = lambda _: None
    before_token: Callable[[str, int, Callable[[], bool]], None] = lambda *_: None
    extra_prompt_tokens: int = 0
    llms: list["LLM"] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    salts: list[str | None] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    aborted: int = 0
    reused_tokens: list[int] = field(default_factory=list)
    wrongly_reused_blocks: int = 0


class _InputProcessor:
    multimodal_hashing_supported: bool | None = None


class _BlockStore:
    """Blocks by what TensorRT-LLM knows of them, with what they really hold."""

    def __init__(self, behaviour: Behaviour, size: int) -> None:
        self._behaviour = behaviour
        self._size = size
        self._blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._lock = threading.Lock()

    def use(self, prompt: Encoded, ids: list[int], salt: str | None, hashed: bool) -> int:
        """Look for the blocks that `ids` begin with, and store all of them; tokens found."""
        contents = _contents(prompt, ids)
        keys = contents if hashed else [(token, None) for token, _ in contents]
        found, missed = 0, False
        with self._lock:
            for end in range(self._size, len(ids) + 1, self._size):
                key = (salt, *keys[:end])
                if key in self._blocks and not missed:
                    found += self._size
                    if self._blocks[key] != tuple(contents[:end]):
                        self._behaviour.wrongly_reused_blocks += 1
                missed = missed or key not in self._blocks
                self._blocks[key] = tuple(contents[:end])
        return found


def _contents(prompt: Encoded, ids: list[int]) -> list[tuple[int, str | None]]:
    media = iter(prompt.media)
    named: list[tuple[int, str | None]] = []
    name: str | None = None
    for index, token in enumerate(ids):
        if token == prompt.pad and (index == 0 or ids[index - 1] != prompt.pad):
            name = next(media)
        named.append((token, name if token == prompt.pad else None))
    return named


class LLM:
    """Set `behaviour` before it is made; `install` gives it a fresh one."""

    behaviour = Behaviour()
    input_processor: _InputProcessor

    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if self.behaviour.load_error is not None:
            raise self.behaviour.load_error
        assert not trust_remote_code
        print("TensorRT-LLM prints to stdout while it loads")
        self._args = TorchLlmArgs(**kwargs)
        self._runner = load_runner(Path(model))
        self.input_processor = _InputProcessor()
        self._store = _BlockStore(self.behaviour, self._args.kv_cache_config.tokens_per_block)
        self._submitting = threading.Lock()
        self._counting = threading.Lock()
        self._down = False
        self.behaviour.llms.append(self)

    def generate_async(
        self,
        inputs: dict[str, Any],
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        behaviour = self.behaviour
        if self._down:
            raise RuntimeError("LLM is shutting down")
        if not self._submitting.acquire(blocking=False):
            raise RuntimeError("Already borrowed")  # transformers' tokenizers, used by two threads
        try:
            assert streaming
            sampling = sampling_params or SamplingParams()
            text = inputs["prompt"]
            behaviour.prompts.append(text)
            behaviour.salts.append(cache_salt)
            behaviour.sampling.append(sampling)
            error = behaviour.refuse(text)
            if error is not None:
                raise error
            prompt = self._encode(inputs)
            if len(prompt.ids) + sampling.max_tokens > (self._args.max_seq_len or 1 << 30):
                raise ValueError("prompt length + max_tokens exceeds max_seq_len")
        finally:
            self._submitting.release()
        ids = prompt.ids + [0] * behaviour.extra_prompt_tokens
        stop = set(sampling.stop_token_ids or ())
        output = RequestOutput(len(behaviour.prompts), ids, stop)
        salt = cache_salt if self._args.kv_cache_config.enable_block_reuse else object()
        threading.Thread(
            target=self._serve, args=(text, prompt, sampling, salt, output), daemon=True
        ).start()
        return output

    def get_stats(self, timeout: float | None = None) -> list[dict[str, Any]]:
        return []

    def shutdown(self) -> None:
        self._down = True

    @property
    def is_down(self) -> bool:
        """For tests: whether `shutdown` was called."""
        return self._down

    def _encode(self, inputs: dict[str, Any]) -> Encoded:
        videos = inputs.get("multi_modal_data", {}).get("video", [])
        options = inputs.get("mm_processor_kwargs", {})
        assert not videos or options["do_resize"] is False
        prompt = self._runner.encode(inputs["prompt"], videos, options.get("fps", 2.0))
        processor = self.input_processor
        if videos and processor.multimodal_hashing_supported is None:
            processor.multimodal_hashing_supported = self.behaviour.hashing
        return prompt

    def _serve(
        self,
        text: str,
        prompt: Encoded,
        sampling: SamplingParams,
        salt: Any,
        output: RequestOutput,
    ) -> None:
        behaviour = self.behaviour
        with self._counting:
            behaviour.at_once += 1
            behaviour.most_at_once = max(behaviour.most_at_once, behaviour.at_once)
        try:
            hashed = bool(self.input_processor.multimodal_hashing_supported)
            behaviour.reused_tokens.append(self._store.use(prompt, prompt.ids, salt, hashed))
            error = behaviour.fail(text)
            if error is not None:
                raise error
            said, reason = [], "length"
            for token in self._tokens(text, prompt, output):
                if output.aborted():
                    reason = "cancelled"
                    break
                said.append(token)
                output._updates.put(token)
                if token == sampling.end_id or token in (sampling.stop_token_ids or ()):
                    reason = "stop"
                    break
                if len(said) == sampling.max_tokens:
                    break
            self._store.use(prompt, [*prompt.ids, *said[:-1]], salt, hashed)
            update: str | Exception = reason
        except Exception as error:
            update = error
        with self._counting:
            behaviour.at_once -= 1
            behaviour.aborted += update == "cancelled"
        output._updates.put(update)

    def _tokens(self, text: str, prompt: Encoded, output: RequestOutput) -> Iterator[int]:
        tokens = self._runner.tokens(prompt)
        count = 0
        while True:
            self.behaviour.before_token(text, count, output.aborted)
            if output.aborted():
                yield 0
            yield next(tokens)
            count += 1


def install(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    """Make `import tensorrt_llm` find the stand-in; returns how it behaves from now on."""
    behaviour = Behaviour()
    monkeypatch.setattr(LLM, "behaviour", behaviour)
    package = _module("tensorrt_llm", LLM=LLM, SamplingParams=SamplingParams)
    package.__version__ = VERSION  # type: ignore[attr-defined]
    modules = [
        package,
        _module(
            "tensorrt_llm.llmapi",
            KvCacheConfig=KvCacheConfig,
            KvCacheRetentionConfig=KvCacheRetentionConfig,
            TorchLlmArgs=TorchLlmArgs,
            RequestOutput=RequestOutput,
            CompletionOutput=CompletionOutput,
        ),
        _module("tensorrt_llm.inputs"),
        _module("tensorrt_llm.inputs.utils", VideoData=VideoData),
    ]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return behaviour


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module
