"""The four models that Triton serves; `triton_repo/` holds the files it looks for.

The ensemble `streaming_vlm` is made of them and has no code.
"""

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from framesink.runtime.arrays import Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.detokenizer import Detokenizer
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import EventKind
from framesink.runtime.executors import create_vision_encoder
from framesink.runtime.preprocess import Grid, frames_to_patches
from framesink.serving import contract
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.images import FrameLimits
from framesink.serving.log_format import configure_logging
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ModelContext
from framesink.serving.requests import (
    RawRequest,
    read_frames,
    read_grid,
    read_times,
    require_timestamps,
)
from framesink.serving.run_directory import EngineReport, RunDirectory
from framesink.serving.session_host import SessionHost
from framesink.serving.triton_adapter import (
    TritonMetricSink,
    TritonResponder,
    input_or,
    make_tensor,
    read_raw_request,
    respond,
)

EXIT_ENGINE_FAILED = 70
# Replies under way that postprocess remembers; the oldest go first.
REMEMBERED_REPLIES = 4096

_log = logging.getLogger(__name__)


def _prepare_process(model_config: str) -> tuple[ModelContext, Bundle]:
    configure_logging(sys.stderr)
    cv2.setNumThreads(1)  # requests run side by side; each needs one core
    context = ModelContext.from_model_config(model_config)
    # Whoever started the server has compared the files with their hashes.
    return context, Bundle.open(context.bundle, check="sizes")


class PreprocessModel:
    """Frames to patches."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        context, bundle = _prepare_process(model_config)
        self._pb_utils = pb_utils
        self._config = bundle.manifest.preprocess
        self._limits = FrameLimits.of(context.options, bundle.manifest.limits.max_patches)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        return respond(self._pb_utils, requests, contract.PREPROCESS, self._answer)

    def _answer(self, raw: RawRequest) -> list[Any]:
        patches = np.empty((0, self._config.patch_dim), np.float32)
        grids: list[list[int]] = []
        chunk: list[float] = []
        if any(values.size for name, values in raw.inputs.items() if name.endswith("FRAMES")):
            times, timestamps = read_times(raw.inputs)
            frames = read_frames(raw.inputs, self._limits, self._config)
            require_timestamps(timestamps, len(frames))
            patches, grid = frames_to_patches(frames, self._config)
            grids.append([grid.t, grid.h, grid.w])
            chunk = [times.t0, times.t1, len(frames)]
        return [
            make_tensor(self._pb_utils, contract.PATCHES, patches),
            make_tensor(self._pb_utils, contract.GRID, np.reshape(grids, (-1, 3))),
            make_tensor(self._pb_utils, contract.CHUNK, chunk),
        ]

    def close(self) -> None:
        """There is nothing to free."""


class VisionEncoderModel:
    """Patches to embeddings."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        context, bundle = _prepare_process(model_config)
        options = context.options
        self._pb_utils = pb_utils
        self._config = bundle.manifest.preprocess
        self._max_patches = bundle.manifest.limits.max_patches
        self._hidden_size = bundle.manifest.model.text.hidden_size
        self._encoder = create_vision_encoder(bundle, options.executor, threads=options.threads)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        return respond(self._pb_utils, requests, contract.VISION_ENCODER, self._answer)

    def _answer(self, raw: RawRequest) -> list[Any]:
        grid = read_grid(input_or(raw, contract.GRID, np.empty((0, 3), np.int32)))
        patches = input_or(raw, contract.PATCHES, np.empty((0, self._config.patch_dim), np.float32))
        embeddings = np.empty((0, self._hidden_size), np.float32)
        if grid is not None:
            self._require_patches(patches, grid)
            embeddings = self._encoder.encode_vision(patches, grid)
        return [make_tensor(self._pb_utils, contract.EMBEDDINGS, embeddings)]

    def _require_patches(self, patches: Float32Array, grid: Grid) -> None:
        merge = self._config.merge_size
        whole = min(grid.t, grid.h, grid.w) >= 1 and grid.h % merge == grid.w % merge == 0
        if not whole or patches.shape != (grid.patches, self._config.patch_dim):
            raise ServingError(
                StatusCode.INVALID_ARGUMENT,
                f"PATCHES {list(patches.shape)} are not those of a grid of {grid.t}×{grid.h}×"
                f"{grid.w} patches; send what preprocess made.",
            )
        if grid.patches > self._max_patches:
            raise ServingError(
                StatusCode.INVALID_ARGUMENT,
                f"A chunk of {grid.patches} patches is larger than the {self._max_patches} this "
                "server was built for.",
            )

    def close(self) -> None:
        """Free the weights."""
        self._encoder.close()


class LanguageModel:
    """Sessions over one engine. Decoupled: `execute` only queues."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        context, bundle = _prepare_process(model_config)
        options = context.options
        directory = RunDirectory(context.run_directory)
        metrics = ServingMetrics(TritonMetricSink(pb_utils))
        engine = StreamingEngine.load(
            bundle,
            options.executor,
            max_sessions=options.max_sessions,
            num_pages=options.num_pages,
            threads=options.threads,
            observer=metrics,
        )
        self._pb_utils = pb_utils
        self._host = SessionHost(
            engine,
            precision=bundle.manifest.language_model.precision,
            options=options,
            metrics=metrics,
            is_draining=lambda: directory.draining,
            on_drained=directory.report_drained,
            on_broken=_end_process,
        )
        directory.report_engine(
            EngineReport(
                executor_reason=engine.executor_reason,
                max_sessions=engine.max_sessions,
                num_pages=engine.stats().pages_total,
                process=os.getpid(),
            )
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Queue requests; their responses come later."""
        for request in requests:
            responder = TritonResponder(self._pb_utils, request)
            try:
                self._host.submit(read_raw_request(request, contract.LANGUAGE_MODEL), responder)
            except ServingError as error:
                responder.fail(error.code, str(error))

    def close(self) -> None:
        """End all sessions."""
        self._host.close()


class PostprocessModel:
    """Token ids to text, reply by reply."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        _, bundle = _prepare_process(model_config)
        self._pb_utils = pb_utils
        self._tokenizer = bundle.tokenizer()
        self._replies: OrderedDict[tuple[int | str, int], Detokenizer] = OrderedDict()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        return respond(self._pb_utils, requests, contract.POSTPROCESS, self._answer)

    def _answer(self, raw: RawRequest) -> list[Any]:
        missing = [t.name for t in contract.EVENT_OUTPUTS if t.name not in raw.inputs]
        if missing:
            raise ServingError(StatusCode.INVALID_ARGUMENT, f"{', '.join(missing)} is missing.")
        outputs: dict[contract.Tensor, Any] = {
            tensor: raw.inputs[tensor.name] for tensor in contract.EVENT_OUTPUTS
        }
        kind = bytes(outputs[contract.KIND].reshape(-1)[0]).decode()
        if kind not in (EventKind.ERROR, EventKind.DEGRADED):
            outputs[contract.TEXT] = [self._text(raw).encode()]
        return [make_tensor(self._pb_utils, tensor, value) for tensor, value in outputs.items()]

    def _text(self, raw: RawRequest) -> str:
        """The piece of text that the words of this response complete."""
        key = (raw.correlation_id, int(raw.inputs[contract.TURN.name][0]))
        final = bool(raw.inputs[contract.FINAL.name][0])
        detokenizer = self._replies.pop(key, None) or Detokenizer(self._tokenizer)
        text = detokenizer.push(raw.inputs[contract.WORDS.name].tolist())
        if final:
            return text + detokenizer.finish()
        self._replies[key] = detokenizer
        if len(self._replies) > REMEMBERED_REPLIES:
            self._replies.popitem(last=False)
        return text

    def close(self) -> None:
        """There is nothing to free."""


def _end_process(sentence: str) -> None:
    """Whoever watches the server starts the model again; it cannot answer anything more."""
    _log.critical("The model ends itself: %s", sentence)
    os._exit(EXIT_ENGINE_FAILED)
