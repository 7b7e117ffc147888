"""Kernels in CUDA C++: compiled when they are first needed, and launched on torch's stream.

NVRTC and the driver's API come with torch's CUDA wheels (`cuda-bindings`); no toolkit is needed.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_PDL_SM = (9, 0)


def why_no_compiler() -> str | None:
    """What keeps CUDA C++ from being compiled here, as the end of a sentence; None if nothing."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError:
        return "the library NVRTC is not installed"
    return None


def compile_source(path: Path, definitions: Mapping[str, int], sm: str) -> bytes:
    """Machine code (a cubin) of the file `path` for the architecture `sm`, such as `sm_90`.

    Raises RuntimeError with the compiler's own words for a source it refuses.
    """
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []))
    options = [f"--gpu-architecture={sm}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in definitions.items()]
    status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{path.name} was not compiled for {sm}: {log.decode(errors='replace')}")
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


class Kernel:
    """A kernel on one GPU that takes one structure."""

    def __init__(
        self,
        path: Path,
        name: str,
        definitions: Mapping[str, int],
        shared_bytes: int,
        device: torch.device,
    ) -> None:
        """Compiles the file `path`; `name` is declared `extern "C"` in it and is launched with
        `shared_bytes` of dynamic shared memory. Raises RuntimeError if that fails."""
        from cuda.bindings import driver

        major, minor = torch.cuda.get_device_capability(device)
        self._shared_bytes = shared_bytes
        self._overlaps = (major, minor) >= _PDL_SM
        code = _compiled(path, tuple(definitions.items()), f"sm_{major}{minor}")
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()
            self._module = _checked(driver.cuModuleLoadData(code))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))

    def launch(self, blocks: int, threads: int, arguments: ctypes.Structure) -> None:
        """Launch on torch's current stream; a launch overlaps the end of the one before, whose
        results the kernel must wait for itself (see overlap.py)."""
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        if self._overlaps:
            attribute = driver.CUlaunchAttribute()
            kinds = driver.CUlaunchAttributeID
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        address = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(address), 0))


def describe_matrix(address: int, rows: int, columns: int, box: tuple[int, int]) -> list[int]:
    """A matrix of bytes at `address` for the copy engine (a CUtensorMap, as 16 integers): it is
    copied in boxes of `box` rows and columns, and what lies outside of it reads as 0. Rows are
    multiples of 16 bytes. Raises RuntimeError for what the copy engine does not take."""
    from cuda.bindings import driver

    wide = driver.cuuint64_t
    narrow = driver.cuuint32_t
    box_rows, box_columns = box
    described = _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [wide(columns), wide(rows)],
            [wide(columns)],
            [narrow(box_columns), narrow(box_rows)],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return [int(word) for word in described.opaque]


@cache
def _compiled(path: Path, definitions: tuple[tuple[str, int], ...], sm: str) -> bytes:
    return compile_source(path, dict(definitions), sm)


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call returned. Raises RuntimeError if it failed."""
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"a call of the CUDA driver or compiler failed: {status!r}")
    return values[0] if values else None
