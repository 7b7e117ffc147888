"""The Triton model `language_model`: sessions over one engine. See framesink.serving.models."""

from typing import Any

import triton_python_backend_utils as pb_utils

from framesink.serving.models import LanguageModel, load_model


class TritonPythonModel:
    """What Triton's Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load."""
        self._model = load_model(LanguageModel, pb_utils, args["model_config"])

    def execute(self, requests: list[Any]) -> None:
        """Queue requests."""
        self._model.execute(requests)

    def finalize(self) -> None:
        """Unload."""
        self._model.close()
