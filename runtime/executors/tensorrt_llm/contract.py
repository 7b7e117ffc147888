"""What is used of the package `tensorrt_llm`, by name, and whether an installed one has it.

TensorRT-LLM changes between minor versions, loads for minutes, and prints while it is imported. So
everything that is used is looked for at once, before a model is loaded.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from framesink.runtime.errors import FramesinkError
from framesink.runtime.executors.needs import Kind, Need, missing_names, names_of

PACKAGE = "tensorrt_llm"
SUPPORTED_VERSIONS = "1.2.x"
INSTALL_HINT = (
    "install framesink[trtllm] on a machine with an NVIDIA GPU as docs/tensorrt-llm.md says, or "
    "use another executor"
)
# Where `VideoData` is, in 1.2 and later.
VIDEO_DATA_MODULES = ("tensorrt_llm.inputs.utils", "tensorrt_llm.inputs.multimodal_data")

NEEDS = (
    Need(
        PACKAGE,
        "LLM",
        Kind.PARAMETERS,
        ("model", "trust_remote_code", "tensor_parallel_size"),
    ),
    Need(
        f"{PACKAGE}.llmapi",
        "TorchLlmArgs",
        Kind.FIELDS,
        (
            "kv_cache_config",
            "max_batch_size",
            "max_num_tokens",
            "max_seq_len",
            "enable_chunked_prefill",
        ),
    ),
    Need(
        f"{PACKAGE}.llmapi",
        "KvCacheConfig",
        Kind.FIELDS,
        ("enable_block_reuse", "enable_partial_reuse", "free_gpu_memory_fraction"),
    ),
    Need(
        PACKAGE,
        "LLM.generate_async",
        Kind.PARAMETERS,
        ("inputs", "sampling_params", "streaming", "cache_salt"),
    ),
    Need(PACKAGE, "LLM", Kind.ATTRIBUTES, ("generate_async", "shutdown")),
    Need(
        PACKAGE,
        "SamplingParams",
        Kind.PARAMETERS,
        (
            "max_tokens",
            "temperature",
            "top_k",
            "top_p",
            "seed",
            "repetition_penalty",
            "stop_token_ids",
            "end_id",
            "pad_id",
            "detokenize",
            "add_special_tokens",
        ),
    ),
    Need(
        f"{PACKAGE}.llmapi",
        "RequestOutput",
        Kind.ATTRIBUTES,
        ("outputs", "prompt_token_ids", "abort", "__iter__", "__next__"),
    ),
    Need(
        f"{PACKAGE}.llmapi",
        "CompletionOutput",
        Kind.ATTRIBUTES,
        ("token_ids", "finish_reason"),
    ),
)
VIDEO_DATA_PARAMETERS = ("frames", "metadata")


@dataclass(frozen=True, slots=True)
class Api:
    """The classes of an installed TensorRT-LLM that has all that is needed."""

    version: str
    llm: Any
    sampling_params: Any
    kv_cache_config: Any
    video_data: Any


def require_installed() -> str | None:
    """The installed version, if its metadata tells, without importing it.

    Raises FramesinkError where there is no such package.
    """
    if find_spec(PACKAGE) is None:
        raise FramesinkError(
            f"The tensorrt_llm executor needs the package {PACKAGE} (version {SUPPORTED_VERSIONS}),"
            f" which is not installed; {INSTALL_HINT}."
        )
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def load_api() -> Api:
    """Import TensorRT-LLM and look for everything that is used of it.

    Raises FramesinkError, in one sentence, where it is not installed, cannot be imported, or lacks
    something, with the version found and the versions supported.
    """
    version = require_installed() or "of unknown version"
    try:
        with stdout_to_stderr():
            package = import_module(PACKAGE)
            llmapi = import_module(f"{PACKAGE}.llmapi")
    except Exception as error:  # a missing library or GPU raises whatever it likes
        raise FramesinkError(
            f"{PACKAGE} {version} cannot be imported here ({type(error).__name__}: "
            f"{first_line(error)}); {INSTALL_HINT}."
        ) from error
    version = str(getattr(package, "__version__", version))
    video_data = _find_video_data()
    missing = [name for need in NEEDS for name in missing_names(need)]
    if video_data is None:
        missing.append(" or ".join(f"{module}.VideoData" for module in VIDEO_DATA_MODULES))
    else:
        have = names_of(video_data, Kind.PARAMETERS)
        missing += [f"VideoData({name})" for name in VIDEO_DATA_PARAMETERS if name not in have]
    if missing:
        raise FramesinkError(
            f"{PACKAGE} {version} lacks {', '.join(missing)}, which the tensorrt_llm executor "
            f"uses; it is written for {SUPPORTED_VERSIONS}."
        )
    return Api(version, package.LLM, package.SamplingParams, llmapi.KvCacheConfig, video_data)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what this process and those it starts write to stdout: captions go there."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def first_line(error: BaseException, most: int = 300) -> str:
    """The beginning of an error's message, in one line."""
    return " ".join(str(error).split())[:most]


def _find_video_data() -> Any | None:
    for name in VIDEO_DATA_MODULES:
        try:
            return import_module(name).VideoData
        except (ImportError, AttributeError):
            continue
    return None
