"""The checkpoint that a bundle carries for executors that read no graphs: TensorRT-LLM."""

import shutil
from collections.abc import Callable
from pathlib import Path

from framesink.build.quantize import notes_of
from framesink.calibration.layouts import (
    LAYER_CONFIG_NAME,
    MODELOPT_QUANTIZATION_NAME,
    Layout,
    fit_to_layout,
)
from framesink.calibration.observers import Observer
from framesink.calibration.quantize import quantize_checkpoint
from framesink.calibration.recipe import Recipe
from framesink.calibration.statistics import Statistics
from framesink.runtime.errors import BuildError, CheckpointError
from framesink.runtime.executors.tensorrt_llm.checkpoint import require_readable
from framesink.runtime.models.checkpoint import INDEX_NAME, Checkpoint
from framesink.runtime.models.companion_files import companion_files
from framesink.runtime.models.quantization import QUANTIZATION_NAME, Quantization

CHECKPOINT_DIRECTORY = "checkpoint"
_DESCRIPTIONS = (INDEX_NAME, MODELOPT_QUANTIZATION_NAME, LAYER_CONFIG_NAME, QUANTIZATION_NAME)


def check_source(source: Checkpoint, recipe: Recipe | None) -> None:
    """Raise BuildError if nothing TensorRT-LLM reads can be made of a checkpoint."""
    if recipe is not None:
        return
    try:
        require_readable(source.directory)
    except CheckpointError as error:
        raise BuildError(f"The bundle cannot carry its checkpoint: {error}") from error


def carried_quantization(quantization: Quantization) -> Quantization:
    """What stays quantized of a bundle's quantization in the checkpoint it carries."""
    return fit_to_layout(quantization, Layout.TENSORRT_LLM).quantization


def write_carried_checkpoint(
    source: Checkpoint,
    recipe: Recipe | None,
    statistics: Statistics | None,
    bundle: Path,
    *,
    observer: Observer,
    on_progress: Callable[[float], None],
) -> tuple[list[Path], list[str]]:
    """Write the checkpoint into the directory of a bundle that is being built.

    It is `source` as it is, or quantized by `recipe` as far as TensorRT-LLM reads it. Returns its
    files, and what a person should know of it. Raises what `quantize_checkpoint` raises.
    """
    directory = bundle / CHECKPOINT_DIRECTORY
    notes: list[str] = []
    if recipe is None:
        _copy(source, directory)
    else:
        summary = quantize_checkpoint(
            source,
            statistics,
            recipe,
            directory,
            layout=Layout.TENSORRT_LLM,
            observer=observer,
            on_progress=on_progress,
        )
        notes = [f"In the checkpoint for TensorRT-LLM, {note}" for note in notes_of(summary)]
    require_readable(directory)
    return sorted(path for path in directory.iterdir()), notes


def _copy(source: Checkpoint, directory: Path) -> None:
    weights = {source.info(name).file for name in source.names()}
    others = [source.directory / name for name in _DESCRIPTIONS]
    directory.mkdir()
    for path in (*companion_files(source.directory), *sorted(weights), *others):
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
