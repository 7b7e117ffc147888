"""Programmatic dependent launch: a kernel starts while the one before it ends (Hopper and later).

Every kernel waits in `await_inputs` before it reads or writes anything but weights, until all
kernels before it are done. A chain of short kernels loses about 1.5 µs less per link, and a linear
layer fetches weights while it waits. Source: CUDA C++ programming guide, "Programmatic Dependent
Launch and Synchronization".
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


@triton.jit
def prefetch(addresses):
    """Fetch the cache line at each of `addresses` into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
