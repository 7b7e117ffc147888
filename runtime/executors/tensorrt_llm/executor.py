"""The executor `tensorrt_llm`: TensorRT-LLM's LLM API on the checkpoint of a bundle.

It has no way to evict inside a sequence, so every turn sends its whole context anew, and block
reuse saves what has not changed since the last turn. See docs/tensorrt-llm.md.
"""

import logging
import secrets
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CheckpointError, FramesinkError
from framesink.runtime.executors.tensorrt_llm.checkpoint import (
    QUANTIZE_HINT,
    require_model_of,
    require_readable,
)
from framesink.runtime.executors.tensorrt_llm.contract import (
    Api,
    first_line,
    load_api,
    require_installed,
    stdout_to_stderr,
)
from framesink.runtime.executors.tensorrt_llm.generation import RequestGeneration
from framesink.runtime.executors.tensorrt_llm.options import TensorRTLLMOptions
from framesink.runtime.executors.tensorrt_llm.trial import trial_request
from framesink.runtime.manifest import Limits
from framesink.runtime.prompting.executor import ReplyRequest
from framesink.runtime.prompting.prompt import Prompt, Video
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.sampler import SamplingParams

SHUTDOWN_SECONDS = 60.0

_log = logging.getLogger(__name__)


class TensorRTLLMExecutor:
    """See `framesink.runtime.prompting.executor.PromptExecutor`.

    Blocks are used again within one session only, and only while TensorRT-LLM is known to tell one
    video from another by its content: every other request gets a salt of its own.
    """

    name = "tensorrt_llm"

    def __init__(
        self, api: Api, llm: Any, options: TensorRTLLMOptions, protocol: ChatProtocol
    ) -> None:
        """Takes over `llm`, an `LLM` of `api`, and shuts it down when it is closed itself."""
        self.settings = options.prompting
        self._api = api
        self._llm = llm
        self._protocol = protocol
        # Submitting tokenizes and preprocesses in the caller's thread, through objects of
        # transformers that are not safe to share.
        self._submitting = threading.Lock()
        self._edition = 0
        self._closed = False

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, options: TensorRTLLMOptions, *, max_sessions: int
    ) -> "TensorRTLLMExecutor":
        """Load the checkpoint and send a trial prompt.

        Raises CheckpointError for a checkpoint that is missing or that TensorRT-LLM does not read,
        before anything is loaded; FramesinkError where TensorRT-LLM is missing, lacks something
        that is used of it, fails to load, or does not answer the trial prompt as it must.
        """
        require_installed()
        checkpoint = _find_checkpoint(bundle, options)
        require_readable(checkpoint)
        require_model_of(bundle, checkpoint)
        api = load_api()
        protocol = bundle.protocol()
        try:
            with stdout_to_stderr():
                llm = load_llm(api, checkpoint, options, bundle.manifest.limits, max_sessions)
        except Exception as error:  # whatever the model, the driver or the memory did
            raise FramesinkError(
                f"tensorrt_llm {api.version} could not load {checkpoint} ({type(error).__name__}: "
                f"{first_line(error)})."
            ) from error
        executor = cls(api, llm, options, protocol)
        try:
            executor.try_out(bundle, options.load_seconds)
        except BaseException:
            executor.close()
            raise
        return executor

    @property
    def reuses_blocks(self) -> bool:
        """Whether media hashing is known to work, so that computed blocks can be used again."""
        processor = getattr(self._llm, "input_processor", None)
        return getattr(processor, "multimodal_hashing_supported", None) is True

    @property
    def reason(self) -> str:
        """Which executor this is, and how it runs, in one sentence."""
        reuse = (
            "what has not changed in a prompt is used again"
            if self.reuses_blocks
            else "nothing is used again, since media hashing does not work here"
        )
        return f"tensorrt_llm {self._api.version} on the GPU: asked for by name; {reuse}."

    def generate(self, request: ReplyRequest, notify: Callable[[], None]) -> RequestGeneration:
        """See PromptExecutor."""
        return RequestGeneration(lambda: self._submit(request), notify)

    def try_out(self, bundle: Bundle, seconds: float) -> None:
        """Send a prompt with two small videos, to see that it becomes the tokens it must, and
        whether media hashing works. Raises FramesinkError if it does not come to its end."""
        request = trial_request(bundle, self._protocol)
        generation = self.generate(request, lambda: None)
        if not generation.wait(seconds):
            generation.cancel()
            raise FramesinkError(f"tensorrt_llm did not answer a prompt within {seconds:g} s.")
        if generation.failure is not None:
            raise FramesinkError(f"A trial prompt failed: {generation.failure}")
        made, expected = generation.prompt_tokens, request.prompt.tokens
        if made is not None and made != expected:
            raise FramesinkError(
                f"tensorrt_llm made {made} tokens of a trial prompt of {expected}: its "
                "preprocessing is not the bundle's, so replies would be about something else."
            )

    def close(self) -> None:
        """See PromptExecutor. A TensorRT-LLM that hangs is left to the end of the process."""
        if self._closed:
            return
        self._closed = True
        ending = threading.Thread(target=self._shut_down, name="tensorrt_llm end", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_SECONDS)
        if ending.is_alive():
            _log.warning("TensorRT-LLM did not shut down within %g s", SHUTDOWN_SECONDS)

    def _shut_down(self) -> None:
        try:
            self._llm.shutdown()
        except Exception:
            _log.warning("TensorRT-LLM did not shut down cleanly", exc_info=True)

    def _submit(self, request: ReplyRequest) -> Any:
        """Send a request; returns its `RequestOutput`."""
        sampling = self._sampling_params(request)
        inputs = self._inputs(request.prompt)
        with self._submitting:
            # Until hashing has worked once nobody knows whether it does; and where it has failed,
            # blocks of different videos would be taken for one another.
            own = secrets.token_hex(16)
            salt = f"{request.session}.{self._edition}" if self.reuses_blocks else own
            result = self._llm.generate_async(
                inputs=inputs, sampling_params=sampling, streaming=True, cache_salt=salt
            )
            if not self.reuses_blocks:
                self._edition += 1  # what was stored under earlier salts is never used again
        return result

    def _inputs(self, prompt: Prompt) -> dict[str, Any]:
        inputs: dict[str, Any] = {"prompt": prompt.text}
        if prompt.videos:
            inputs["multi_modal_data"] = {"video": [self._video(v) for v in prompt.videos]}
            rates = [video.fps for video in prompt.videos]
            one_rate = len(set(rates)) == 1
            # Frames have the model's size already.
            inputs["mm_processor_kwargs"] = {
                "fps": rates[0] if one_rate else rates,
                "do_resize": False,
            }
        return inputs

    def _video(self, video: Video) -> Any:
        image = import_module("PIL.Image")  # comes with TensorRT-LLM
        count = len(video.pixels)
        return self._api.video_data(
            frames=[image.fromarray(np.ascontiguousarray(frame)) for frame in video.pixels],
            metadata={
                "fps": video.fps,
                "duration": count / video.fps,
                "total_num_frames": count,
                "frames_indices": list(range(count)),
            },
        )

    def _sampling_params(self, request: ReplyRequest) -> Any:
        end = self._protocol.turn_end
        return self._api.sampling_params(
            max_tokens=request.max_new_tokens,
            end_id=end,
            pad_id=self._protocol.end_of_text,
            stop_token_ids=sorted(request.stop_tokens - {end}),
            detokenize=False,
            add_special_tokens=False,
            **_choice(request.sampling),
        )


def _choice(sampling: SamplingParams) -> dict[str, Any]:
    """How tokens are chosen; what is off is left out, since its notation differs."""
    chosen: dict[str, Any] = {}
    if sampling.repetition_penalty != 1.0:
        chosen["repetition_penalty"] = sampling.repetition_penalty
    if sampling.temperature == 0.0:
        return {**chosen, "top_k": 1}
    chosen |= {"temperature": sampling.temperature, "seed": sampling.seed}
    if sampling.top_k > 0:
        chosen["top_k"] = sampling.top_k
    if sampling.top_p < 1.0:
        chosen["top_p"] = sampling.top_p
    return chosen


def _find_checkpoint(bundle: Bundle, options: TensorRTLLMOptions) -> Path:
    if options.checkpoint is not None:
        return options.checkpoint
    carried = bundle.checkpoint()
    if carried is not None:
        return carried
    raise CheckpointError(
        f"The bundle {bundle.directory} carries no checkpoint, which TensorRT-LLM reads in place "
        "of its graphs; build it with --with-checkpoint, or name a directory with --checkpoint "
        f"({QUANTIZE_HINT})."
    )


def load_llm(
    api: Api, checkpoint: Path, options: TensorRTLLMOptions, limits: Limits, max_sessions: int
) -> Any:
    """An `LLM` of `api` with paged K/V, in-flight batching of so many sessions, chunked prefill and
    block reuse, within a bundle's limits. Raises whatever TensorRT-LLM raises."""
    return api.llm(
        model=str(checkpoint),
        trust_remote_code=False,
        tensor_parallel_size=options.tensor_parallel_size,
        max_batch_size=max_sessions,
        max_num_tokens=max(limits.max_prefill, max_sessions),
        max_seq_len=limits.max_context,
        enable_chunked_prefill=True,
        kv_cache_config=api.kv_cache_config(
            enable_block_reuse=True,
            enable_partial_reuse=True,
            free_gpu_memory_fraction=options.gpu_memory_fraction,
        ),
    )
