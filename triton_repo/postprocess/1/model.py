"""The Triton model `postprocess`: token ids to text. See framesink.serving.models."""

from typing import Any

import triton_python_backend_utils as pb_utils

from framesink.serving.models import PostprocessModel, load_model


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load."""
        self._model = load_model(PostprocessModel, pb_utils, args["model_config"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests."""
        return self._model.execute(requests)

    def finalize(self) -> None:
        """Unload."""
        self._model.close()
