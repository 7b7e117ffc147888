"""What the small files of a checkpoint say: preprocessing and streaming."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from framesink.runtime.errors import CheckpointError
from framesink.runtime.manifest import StreamingDefaults
from framesink.runtime.models.companion_files import PREPROCESSOR_NAME, STREAMING_NAME
from framesink.runtime.models.config import VisionConfig
from framesink.runtime.preprocess import PreprocessConfig

_MAX_JSON_BYTES = 16_000_000
_Model = TypeVar("_Model", bound=BaseModel)


class StreamingConfig(StreamingDefaults):
    """`streaming_config.json` of a checkpoint: how it was trained to be streamed.

    Every field may be left out. Beside the streaming defaults it sets frames per second of video
    time, and the pixels of a frame.
    """

    fps: PositiveFloat | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None

    @property
    def defaults(self) -> StreamingDefaults:
        """The streaming defaults alone."""
        return StreamingDefaults(**self.model_dump(include=set(StreamingDefaults.model_fields)))


class _PreprocessorFile(BaseModel):
    """The fields that matter of `preprocessor_config.json`, in transformers 4's and 5's layouts."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    patch_size: PositiveInt | None = None
    temporal_patch_size: PositiveInt | None = None
    merge_size: PositiveInt | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    size: dict[str, Any] | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None


def read_streaming_config(directory: Path) -> StreamingConfig:
    """`streaming_config.json` where the checkpoint has one, else the defaults.

    Raises CheckpointError if it is malformed.
    """
    path = directory / STREAMING_NAME
    return _parse(path, StreamingConfig) if path.is_file() else StreamingConfig()


def read_preprocess_config(
    directory: Path, streaming: StreamingConfig, vision: VisionConfig
) -> PreprocessConfig:
    """Preprocessing constants: those of the checkpoint, limited to what live video can afford.

    Published checkpoints allow frames of 12.8 million pixels; without a word of
    `streaming_config.json` the smaller limits of PreprocessConfig hold. Raises CheckpointError if
    `preprocessor_config.json` is malformed or does not fit the vision encoder.
    """
    live = PreprocessConfig()
    path = directory / PREPROCESSOR_NAME
    file = _parse(path, _PreprocessorFile) if path.is_file() else _PreprocessorFile()
    _check_fit(path, file, vision)
    size = file.size or {}
    smallest = file.min_pixels or size.get("shortest_edge") or live.min_pixels
    largest = file.max_pixels or size.get("longest_edge") or live.max_pixels
    max_pixels = streaming.max_pixels or min(int(largest), live.max_pixels)
    min_pixels = streaming.min_pixels or min(max(int(smallest), 1), max_pixels)
    if min_pixels > max_pixels:
        raise CheckpointError(
            f"{directory} asks for frames of at least {min_pixels} and at most {max_pixels} pixels."
        )
    return PreprocessConfig(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mean=file.image_mean or live.mean,
        std=file.image_std or live.std,
        fps=streaming.fps or live.fps,
    )


def _check_fit(path: Path, file: _PreprocessorFile, vision: VisionConfig) -> None:
    for name, found, expected in (
        ("patch_size", file.patch_size, vision.patch_size),
        ("temporal_patch_size", file.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", file.merge_size, vision.spatial_merge_size),
    ):
        if found is not None and found != expected:
            raise CheckpointError(
                f"{path} says {name} {found}, but the vision encoder in config.json has {expected}."
            )


def _parse(path: Path, model: type[_Model]) -> _Model:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES)
        return model.model_validate(json.loads(data))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is malformed at {place or 'its top'}: {first['msg']}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON.") from error
