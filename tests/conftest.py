"""Fixtures shared by all tests: a tiny checkpoint and the engine bundle built from it."""

from pathlib import Path

import pytest
from reference.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Qwen2.5-VL checkpoint of about 0.2 M parameters, in float32."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_tiny_checkpoint(directory)
    return directory
