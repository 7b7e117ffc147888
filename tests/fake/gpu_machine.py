"""Makes a test's machine one with a GPU and a TensorRT package; its memory is the host's."""

import sys

import pytest
import torch

from fake import tensorrt as stand_in
from framesink.runtime.executors.tensorrt import executor


def install(
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    *,
    version: str = stand_in.VERSION,
    sm: str | None = "sm89",
) -> None:
    """Until the test ends, `package` is the stand-in and GPU 0 of architecture `sm` (None: there is
    none)."""
    monkeypatch.setitem(sys.modules, package, stand_in.as_module(package, version))
    for place in ("bundle", "executors", "executors.tensorrt.support"):
        monkeypatch.setattr(f"framesink.runtime.{place}.current_sm", lambda: sm)
    monkeypatch.setattr(executor, "GPU", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stand_in.engines.clear()
