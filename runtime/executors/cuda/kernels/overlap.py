"""Programmatic dependent launch: a kernel starts while the one before it ends (Hopper and later).

Every kernel waits in `await_inputs` until all kernels before it are done; until then it writes
nothing, and reads nothing but weights. On an H200 that takes 4 % off a decode step of one stream.
Source: CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments that every kernel on `device` is launched with."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def await_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait for the ones before."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
