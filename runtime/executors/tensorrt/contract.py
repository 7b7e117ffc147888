"""What is used of `tensorrt` and `tensorrt_rtx`, by name, and whether an installed one has it.

Both packages have one API; only TensorRT-RTX captures CUDA graphs by itself.
"""

from importlib import import_module
from typing import Any, Literal

from framesink.runtime.errors import BundleError
from framesink.runtime.executors.needs import Kind, Need, missing_names

Package = Literal["tensorrt", "tensorrt_rtx"]

_OF_BOTH = {
    "ILogger": ("log", "ERROR", "INTERNAL_ERROR"),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "num_io_tensors",
        "num_optimization_profiles",
        "device_memory_size_v2",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "get_tensor_profile_shape",
        "create_execution_context",
    ),
    "IExecutionContext": (
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "infer_shapes",
        "execute_async_v3",
    ),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("FLOAT", "HALF", "BF16", "INT8", "INT32", "FP8"),
}
_OF_RTX = {
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("set_execution_context_allocation_strategy", "cuda_graph_strategy"),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
}
# The manifest's names of TensorRT's types.
DTYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "FP8": "float8_e4m3fn",
}


def needs(package: Package) -> list[Need]:
    """Every name that is used of a package."""
    wanted = [*_OF_BOTH.items(), *(_OF_RTX.items() if package == "tensorrt_rtx" else ())]
    return [Need(package, owner, Kind.ATTRIBUTES, names) for owner, names in wanted]


def load_api(package: Package) -> Any:
    """The package's module, which has every name that is used.

    Raises BundleError where it cannot be imported or lacks one.
    """
    try:
        module = import_module(package)
    except Exception as error:  # a stub package or a missing library raises its own kind
        raise BundleError(
            f"The bundle's plans need {package}, which cannot be imported here "
            f"({type(error).__name__}); install it, or use the onnxruntime executor."
        ) from error
    missing = [name for need in needs(package) for name in missing_names(need)]
    if missing:
        raise BundleError(
            f"{package} {module.__version__} lacks {', '.join(missing)}, which the tensorrt "
            "executor uses; install the version that the bundle was built with."
        )
    return module
