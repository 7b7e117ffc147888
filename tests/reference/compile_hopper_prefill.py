"""Compile the kernel of Hopper without a GPU, and print what the assembler says of it.

A program of its own: where Triton interprets kernels, it compiles none.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from framesink.runtime.executors.cuda.kernels import hopper_prefill

CONSTANTS = {"GROUP": 7, "KEY_HEADS": 4, "OVERLAP": True}
ALIGNED = ("qkv", "mixed_parts", "softmax_parts", "qkv_stride")


def tiles_of(element: gl.dtype) -> str:
    """How the compiler is told of matrices that are read in tiles."""
    layout = gl.NVMMASharedLayout.get_default_for([128, 128], element)
    return f"tensordesc<{element.name}[128, 128],{layout!r}>"


def report(element: gl.dtype, value_element: gl.dtype) -> str:
    """What the assembler says of the kernel for such queries and keys, and such values."""
    names = hopper_prefill._attend.arg_names
    kinds = {"qkv": f"*{element.name}", "value_scale": "*fp32", "score_scale": "fp32"}
    kinds |= {"keys": tiles_of(element), "values": tiles_of(value_element)}
    kinds |= {"starts": "*i32", "counts": "*i32"}
    kinds |= {"mixed_parts": "*fp32", "softmax_parts": "*fp32"}
    kinds |= dict.fromkeys(CONSTANTS, "constexpr")
    compiled = triton.compile(
        GluonASTSource(
            hopper_prefill._attend,
            {name: kinds.get(name, "i32") for name in names},
            constexprs=CONSTANTS,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": 168, "launch_pdl": True},
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.asm["ptx"])
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", "out"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stderr


if __name__ == "__main__":
    print(report(getattr(gl, sys.argv[1]), getattr(gl, sys.argv[2])))
