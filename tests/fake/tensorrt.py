"""A stand-in for `tensorrt` and `tensorrt_rtx`: their runtime's names and rules over ONNX Runtime.

A "plan" is a JSON file that names an ONNX graph and its interface. A context reads and writes the
memory at the addresses it was given, as the real one does, and refuses what that refuses: shapes
outside its profile, runs without memory, shapes or addresses.
"""

import ctypes
import json
import math
from collections.abc import Mapping
from enum import Enum
from mmap import mmap
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from framesink.runtime.executors.onnx_graph import load_graph
from framesink.runtime.manifest import PlanSpec, TensorSpec

VERSION = "1.7.1.116"
SCRATCH_BYTES = 4096
NUMPY_TYPES: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "int32": np.int32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


class DataType(Enum):
    FLOAT = "float32"
    HALF = "float16"
    BF16 = "bfloat16"
    INT8 = "int8"
    INT32 = "int32"
    FP8 = "float8_e4m3fn"


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ILogger:
    INTERNAL_ERROR = 0
    ERROR = 1

    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: mmap) -> "ICudaEngine | None":
        try:
            content = json.loads(bytes(serialized_engine))
            spec = PlanSpec.model_validate(content["spec"])
        except ValueError:
            self._logger.log(ILogger.ERROR, "Magic tag does not match")
            return None
        return ICudaEngine(Path(content["graph"]), spec, self._logger)


class ICudaEngine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, graph: Path, spec: PlanSpec, logger: ILogger) -> None:
        self.spec = spec
        self.logger = logger
        self.graph = load_graph(graph, 1)
        self.tensors: dict[str, TensorSpec] = {v.name: v for v in (*spec.inputs, *spec.outputs)}
        self.contexts: list[IExecutionContext] = []
        engines.append(self)

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.spec.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {value.name for value in self.spec.inputs}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name].dtype)

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.tensors[name].shape]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        bounds = self.spec.profiles[profile_index].inputs[name]
        return [list(bounds.minimum), list(bounds.optimum), list(bounds.maximum)]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig
    ) -> "IExecutionContext":
        captures = CudaGraphStrategy.DISABLED
        if isinstance(strategy, IRuntimeConfig):
            assert self.spec.builder == "tensorrt_rtx"
            captures, strategy = strategy.cuda_graph_strategy, strategy.strategy
        context = IExecutionContext(self, strategy, captures)
        self.contexts.append(context)
        return context


class IExecutionContext:
    def __init__(
        self,
        engine: ICudaEngine,
        strategy: ExecutionContextAllocationStrategy,
        captures: CudaGraphStrategy,
    ) -> None:
        self.engine = engine
        self.captures = captures
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._has_memory = strategy is ExecutionContextAllocationStrategy.STATIC

    def set_device_memory(self, memory: int, size: int) -> None:
        self._has_memory = memory != 0 and size >= SCRATCH_BYTES

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        self._shapes.clear()
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        bounds = self.engine.spec.profiles[self._profile].inputs[name]
        inside = len(shape) == len(bounds.minimum) and all(
            low <= size <= high
            for low, size, high in zip(bounds.minimum, shape, bounds.maximum, strict=True)
        )
        if not inside:
            self.engine.logger.log(ILogger.ERROR, f"setInputShape: {name} {shape} not in range")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self.engine.tensors and memory != 0

    def infer_shapes(self) -> list[str]:
        sizes: dict[str, int] = {}
        for value in self.engine.spec.inputs:
            for name, size in zip(value.shape, self._shapes.get(value.name, ()), strict=False):
                if isinstance(name, str) and sizes.setdefault(name, size) != size:
                    raise RuntimeError(f"inferShapes: {name} is {size} and {sizes[name]}")
        return [v.name for v in self.engine.spec.inputs if v.name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._has_memory or self.engine.tensors.keys() - self._addresses.keys():
            self.engine.logger.log(ILogger.ERROR, "enqueueV3: memory or address is missing")
            return False
        feeds = {name: self._read(name, shape) for name, shape in self._shapes.items()}
        names = [value.name for value in self.engine.spec.outputs]
        for name, value in zip(names, self.engine.graph.run(names, feeds), strict=True):
            content = np.ascontiguousarray(value)
            dtype = np.dtype(NUMPY_TYPES[self.engine.tensors[name].dtype])
            assert content.itemsize == dtype.itemsize
            ctypes.memmove(self._addresses[name], content.ctypes.data, content.nbytes)
        self.runs.append(dict(self._shapes))
        return True

    def _read(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        dtype = np.dtype(NUMPY_TYPES[self.engine.tensors[name].dtype])
        memory = ctypes.string_at(self._addresses[name], math.prod(shape) * dtype.itemsize)
        return np.frombuffer(memory, dtype).reshape(shape)


engines: list[ICudaEngine] = []
NAMES = (
    CudaGraphStrategy,
    DataType,
    ExecutionContextAllocationStrategy,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    IRuntimeConfig,
    Runtime,
    TensorIOMode,
)


def as_module(name: str = "tensorrt_rtx", version: str = VERSION) -> ModuleType:
    """The stand-in, to be found by `import`."""
    module = ModuleType(name)
    module.__dict__.update({value.__name__: value for value in NAMES}, __version__=version)
    return module


def write_plan(path: Path, graph: Path, spec: PlanSpec) -> None:
    """A plan that runs an ONNX graph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"graph": str(graph), "spec": spec.model_dump(mode="json")}))
