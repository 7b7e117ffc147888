"""A plan on the GPU: deserialized, compared with the manifest, bound and executed."""

import mmap
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framesink.runtime.bundle import REBUILD_HINT
from framesink.runtime.errors import BundleError, CapacityError, FramesinkError
from framesink.runtime.executors.tensorrt.contract import DTYPE_NAMES
from framesink.runtime.executors.tensorrt.interface import REPEATED_PROFILE
from framesink.runtime.executors.tensorrt.shapes import choose_profile
from framesink.runtime.manifest import PlanSpec, TensorSpec

_KEPT_ERRORS = 8
# FP8 codes are bytes here: torch writes them into pages typed int8.
TORCH_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.int8,
    "int32": torch.int32,
}


class Plan:
    """One engine. Contexts made of it share the memory given by `use_scratch`, so they must run one
    after the other, in one stream."""

    def __init__(self, api: Any, file: Path, spec: PlanSpec, device: torch.device) -> None:
        """`api` is the module of the package that built the plan.

        Raises BundleError if TensorRT refuses the plan, or finds in it what the manifest does not
        say.
        """
        self.spec = spec
        self.device = device
        self._api = api
        self._errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self._logger = _make_logger(api, self._errors)
        self._runtime = api.Runtime(self._logger)
        self._engine = self._deserialize(file)
        self._scratch: Tensor | None = None
        self._contexts: dict[int, Any] = {}
        self._check_engine()

    @property
    def scratch_bytes(self) -> int:
        """Bytes of memory that a run needs beside its inputs and outputs."""
        return int(self._engine.device_memory_size_v2)

    def use_scratch(self, scratch: Tensor) -> None:
        """Give the memory, at least `scratch_bytes` of it."""
        self._scratch = scratch

    def profile_for(self, inputs: Mapping[str, Tensor]) -> int:
        """The profile that inputs of these shapes run in. Raises CapacityError if there is none."""
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        number = choose_profile(self.spec.profiles, shapes)
        if number is None:
            sizes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise CapacityError(
                f"{self.spec.path} was not built for a step of {sizes[:400]}; build the bundle "
                "with larger limits."
            )
        return number

    def context(self, profile: int) -> Any:
        """The context of a profile, made when it is first asked for."""
        if profile not in self._contexts:
            self._contexts[profile] = self.new_context(profile)
        return self._contexts[profile]

    def new_context(self, profile: int) -> Any:
        """A context of a profile, its own for as long as a CUDA graph is captured of it."""
        strategy = self._api.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures_itself:
            # Prompt parts and chunks differ in size: graphs of them would never be replayed.
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self.spec.profiles[profile].name == REPEATED_PROFILE:
                config.cuda_graph_strategy = self._api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._failure("cannot be run")
        assert self._scratch is not None
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        if not context.set_optimization_profile_async(profile, self._stream()):
            raise self._failure(f"has no profile {profile}")
        return context

    @property
    def captures_itself(self) -> bool:
        """Whether repeated shapes become CUDA graphs inside the package."""
        return self.spec.builder == "tensorrt_rtx"

    def bind(
        self, context: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Let a context read its inputs and write its outputs where these tensors lie.

        Raises FramesinkError if TensorRT refuses.
        """
        self._errors.clear()
        for name, value in inputs.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise self._failure(f"refuses {name} of shape {list(value.shape)}")
        for name, value in {**inputs, **outputs}.items():
            if not context.set_tensor_address(name, value.data_ptr()):
                raise self._failure(f"refuses the memory of {name}")
        try:
            unspecified = context.infer_shapes()
        except RuntimeError as error:
            raise self._failure("has inputs whose shapes contradict each other") from error
        if unspecified:
            raise self._failure(f"was not told the shape of {', '.join(unspecified)}")

    def launch(self, context: Any) -> None:
        """Launch what is bound, in the current stream. Raises FramesinkError if it fails."""
        self._errors.clear()
        if not context.execute_async_v3(self._stream()):
            raise self._failure("failed to run")

    def allocate(self, names: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Memory for inputs or outputs, by their names and shapes."""
        types = {value.name: value.dtype for value in (*self.spec.inputs, *self.spec.outputs)}
        return {
            name: torch.empty(shape, dtype=TORCH_TYPES[types[name]], device=self.device)
            for name, shape in names.items()
        }

    def close(self) -> None:
        """Free contexts and weights."""
        self._contexts.clear()
        del self._engine, self._runtime

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _deserialize(self, file: Path) -> Any:
        try:
            with (
                file.open("rb") as handle,
                mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:
            raise BundleError(f"Cannot read {file}: {error}.") from error
        if engine is None:
            raise BundleError(str(self._failure("cannot be loaded here")))
        return engine

    def _failure(self, what: str) -> FramesinkError:
        reason = " ".join(self._errors[-1].split())[:300] if self._errors else "it gave no reason"
        return FramesinkError(f"The plan {self.spec.path} {what}; TensorRT says: {reason}.")

    def _check_engine(self) -> None:
        spec, engine = self.spec, self._engine
        names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        modes = self._api.TensorIOMode
        told = {
            **{value.name: (modes.INPUT, value) for value in spec.inputs},
            **{value.name: (modes.OUTPUT, value) for value in spec.outputs},
        }
        differing = sorted(names ^ told.keys())
        differing += [
            name
            for name, (mode, value) in told.items()
            if name in names
            and (engine.get_tensor_mode(name) != mode or not self._is_as_told(value))
        ]
        profiles = engine.num_optimization_profiles == len(spec.profiles)
        if profiles and not differing:
            differing += [
                f"{name} in the profile {profile.name}"
                for number, profile in enumerate(spec.profiles)
                for name, bounds in profile.inputs.items()
                if [tuple(shape) for shape in engine.get_tensor_profile_shape(name, number)]
                != [bounds.minimum, bounds.optimum, bounds.maximum]
            ]
        if differing or not profiles:
            what = ", ".join(differing[:4]) or "the number of its profiles"
            raise BundleError(
                f"{spec.path} is not what the manifest says it is: {what} differs; {REBUILD_HINT}."
            )

    def _is_as_told(self, value: TensorSpec) -> bool:
        dtype = DTYPE_NAMES.get(self._engine.get_tensor_dtype(value.name).name)
        shape = tuple(self._engine.get_tensor_shape(value.name))
        told = tuple(size if isinstance(size, int) else -1 for size in value.shape)
        return dtype == value.dtype and shape == told


def _make_logger(api: Any, errors: deque[str]) -> Any:
    """A logger that keeps the errors: TensorRT gives its reasons nowhere else."""
    serious = (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR)

    class Logger(api.ILogger):  # type: ignore[misc]  # the package is chosen at run time
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in serious:
                errors.append(text)

    return Logger()
