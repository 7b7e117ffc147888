"""The four models that Triton serves; `triton_repo/` holds the files it looks for.

The ensemble `streaming_vlm` is made of them and has no code.
"""

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np

from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.detokenizer import Detokenizer
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import FramesinkError
from framesink.runtime.events import EventKind
from framesink.runtime.executors import create_vision_encoder
from framesink.runtime.garbage import pass_over_what_is_loaded
from framesink.runtime.preprocess import Grid, frames_to_patches
from framesink.serving import contract
from framesink.serving.errors import ServingError, StatusCode
from framesink.serving.images import FrameLimits
from framesink.serving.log_format import configure_logging
from framesink.serving.metrics import ServingMetrics
from framesink.serving.options import ModelContext
from framesink.serving.requests import (
    RawRequest,
    has_frames,
    read_frames,
    read_grid,
    read_times,
    require_timestamps,
)
from framesink.serving.run_directory import EngineReport, RunDirectory
from framesink.serving.session_host import SessionHost
from framesink.serving.triton_adapter import (
    StatelessModel,
    TritonMetricSink,
    TritonResponder,
    read_raw_request,
)

EXIT_ENGINE_FAILED = 70
# Replies under way that postprocess remembers; the oldest go first.
REMEMBERED_REPLIES = 4096

_log = logging.getLogger(__name__)


_Served = TypeVar("_Served")


def load_model(model: Callable[[Any, str], _Served], pb_utils: Any, model_config: str) -> _Served:
    """A model of this module, from the JSON that Triton hands to `initialize` as `model_config`.

    What keeps it from loading is told to whoever started the server, and raised.
    """
    context = ModelContext.from_model_config(model_config)
    configure_logging(sys.stderr, context.options.log_level)
    try:
        return model(pb_utils, model_config)
    except Exception as error:
        known = isinstance(error, FramesinkError)
        sentence = str(error) if known else f"{type(error).__name__}: {error}"
        RunDirectory(context.run_directory).report_failure(sentence)
        raise


def _prepare_process(model_config: str) -> tuple[ModelContext, Bundle]:
    cv2.setNumThreads(1)  # requests run side by side; each needs one core
    context = ModelContext.from_model_config(model_config)
    # Whoever started the server has compared the files with their hashes.
    return context, Bundle.open(context.bundle, check="sizes")


class PreprocessModel(StatelessModel):
    """Frames to patches."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        context, bundle = _prepare_process(model_config)
        self._config = bundle.manifest.preprocess
        self._limits = FrameLimits.of(context.options, bundle.manifest.limits.max_patches)
        super().__init__(pb_utils, contract.PREPROCESS)

    def answer(self, raw: RawRequest) -> Mapping[contract.Tensor, Any]:
        """See StatelessModel."""
        if not has_frames(raw.inputs):
            return {}
        times, timestamps = read_times(raw.inputs)
        frames = read_frames(raw.inputs, self._limits, self._config)
        require_timestamps(timestamps, len(frames))
        patches, grid = frames_to_patches(frames, self._config)
        return {
            contract.PATCHES: patches,
            contract.GRID: [[grid.t, grid.h, grid.w]],
            contract.CHUNK: [times.t0, times.t1, len(frames)],
        }

    def close(self) -> None:
        """There is nothing to free."""


class VisionEncoderModel(StatelessModel):
    """Patches to embeddings."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        context, bundle = _prepare_process(model_config)
        options, manifest = context.options, bundle.manifest
        self._config = manifest.preprocess
        self._max_patches = manifest.limits.max_patches
        self._encoder = create_vision_encoder(bundle, options.executor, threads=options.threads)
        super().__init__(pb_utils, contract.VISION_ENCODER)

    def answer(self, raw: RawRequest) -> Mapping[contract.Tensor, Any]:
        """See StatelessModel."""
        patches, grids = (raw.inputs.get(t.name) for t in (contract.PATCHES, contract.GRID))
        if patches is None or grids is None:
            raise ServingError(StatusCode.INVALID_ARGUMENT, "PATCHES or GRID is missing.")
        grid = read_grid(grids)
        if grid is None:
            return {}
        self._require_patches(patches, grid)
        return {contract.EMBEDDINGS: self._encoder.encode_vision(patches, grid)}

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
        if not np.isfinite(patches).all():
            raise ServingError(
                StatusCode.INVALID_ARGUMENT, "PATCHES must be finite; send what preprocess made."
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
        if options.admission == "check":
            engine.measure_costs()
        pass_over_what_is_loaded()
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
                capacity=engine.capacity().sentence(),
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


class PostprocessModel(StatelessModel):
    """Token ids to text, reply by reply."""

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """`model_config` is the JSON that `initialize` is given."""
        _, bundle = _prepare_process(model_config)
        self._vocabulary = bundle.manifest.model.text.vocab_size
        self._tokenizer = bundle.tokenizer()
        self._replies: OrderedDict[tuple[int | str, int], Detokenizer] = OrderedDict()
        super().__init__(pb_utils, contract.POSTPROCESS)

    def answer(self, raw: RawRequest) -> Mapping[contract.Tensor, Any]:
        """See StatelessModel. What is no reply has its text already."""
        missing = [t.name for t in contract.EVENT_OUTPUTS if t.name not in raw.inputs]
        if missing:
            raise ServingError(StatusCode.INVALID_ARGUMENT, f"{', '.join(missing)} is missing.")
        outputs: dict[contract.Tensor, Any] = {
            tensor: raw.inputs[tensor.name] for tensor in contract.EVENT_OUTPUTS
        }
        words = outputs[contract.WORDS]
        # The tokenizer remembers every id it was asked for.
        if words.size and not (words.min() >= 0 and words.max() < self._vocabulary):
            raise ServingError(
                StatusCode.INVALID_ARGUMENT,
                f"WORDS are token ids, from 0 to {self._vocabulary - 1}; send what language_model "
                "made.",
            )
        if _kind(outputs[contract.KIND]) not in (EventKind.ERROR, EventKind.DEGRADED):
            outputs[contract.TEXT] = [self._text(raw).encode()]
        return outputs

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


def _kind(values: AnyArray) -> EventKind:
    """What a KIND tensor holds. Raises ServingError for one that holds no kind."""
    try:
        return EventKind(bytes(values[0]).decode())
    except ValueError as error:
        kinds = ", ".join(EventKind)
        raise ServingError(StatusCode.INVALID_ARGUMENT, f"KIND must be one of {kinds}.") from error


def _end_process(sentence: str) -> None:
    """Whoever watches the server starts the model again; it cannot answer anything more."""
    _log.critical("The model ends itself: %s", sentence)
    os._exit(EXIT_ENGINE_FAILED)
