"""Fixtures shared by all tests: a tiny checkpoint and the engine bundle built from it."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reference.tiny_checkpoint import write_tiny_checkpoint

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Qwen2.5-VL checkpoint of about 0.2 M parameters, in float32."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> "Qwen2_5_VLForConditionalGeneration":
    """The tiny checkpoint in transformers, in float64, with plain attention."""
    from reference.dense_model import load_model

    return load_model(tiny_checkpoint)
