"""Compile one authored ONNX graph into a TensorRT plan, in this process.

`framesink.build.plans.process` runs this in a process of its own, so that the memory of one part
is back before the next one starts.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framesink.build.plans.builder import load_module
from framesink.build.plans.jobs import CompiledPlan, CompileJob
from framesink.build.plans.messages import BuilderMessage, Severity
from framesink.build.plans.plan_file import PlanFile
from framesink.build.plans.progress import PhaseTree
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import OptimizationProfile, TensorSpec

_DTYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}


def compile_plan(
    job: CompileJob,
    *,
    on_progress: Callable[[float, str], None],
    on_message: Callable[[BuilderMessage], None],
    cancelled: Callable[[], bool],
) -> CompiledPlan:
    """Compile `job.graph` and stream the plan to `job.plan`.

    `on_progress` gets the fraction done and the running phase; it and `cancelled` are called from
    the builder's threads. Raises BuildError when the graph does not parse or build, when the
    builder said something that can mean wrong numbers, and when the work was cancelled; the plan
    file does not exist afterwards.
    """
    started = time.monotonic()
    trt = load_module(job.builder)
    messages: list[BuilderMessage] = []

    def record(message: BuilderMessage) -> None:
        messages.append(message)
        on_message(message)

    logger = _make_logger(trt, record)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, job.graph)
    _refuse_wrong_numbers(job.graph, messages)

    config = builder.create_builder_config()
    config.progress_monitor = _make_monitor(trt, PhaseTree(), on_progress, cancelled)
    if job.builder == "tensorrt_rtx":
        config.num_compute_capabilities = len(job.targets)
        for index, target in enumerate(job.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    for profile in job.profiles:
        _add_profile(builder, config, profile)

    try:
        _build_to_file(trt, builder, network, config, job, messages, cancelled)
        _refuse_wrong_numbers(job.graph, messages)
    except BaseException:
        job.plan.unlink(missing_ok=True)
        raise
    return CompiledPlan(
        inputs=tuple(_spec(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(_spec(network.get_output(i)) for i in range(network.num_outputs)),
        builder_version=trt.__version__,
        plan_bytes=job.plan.stat().st_size,
        seconds=time.monotonic() - started,
    )


def _parse(trt: Any, network: Any, logger: Any, graph: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"TensorRT cannot parse {graph.name}: {'; '.join(reasons)}.")


def _refuse_wrong_numbers(graph: Path, messages: list[BuilderMessage]) -> None:
    for message in messages:
        if message.means_wrong_numbers:
            raise BuildError(
                f"TensorRT said about {graph.name} what can mean wrong results, so no plan was "
                f"kept: {message.text}"
            )


def _add_profile(builder: Any, config: Any, profile: OptimizationProfile) -> None:
    native = builder.create_optimization_profile()
    for name, shape in profile.inputs.items():
        native.set_shape(name, shape.minimum, shape.optimum, shape.maximum)
    if config.add_optimization_profile(native) < 0:
        raise BuildError(f"TensorRT refuses the optimization profile {profile.name}.")


def _build_to_file(
    trt: Any,
    builder: Any,
    network: Any,
    config: Any,
    job: CompileJob,
    messages: list[BuilderMessage],
    cancelled: Callable[[], bool],
) -> None:
    write_errors: list[OSError] = []
    with PlanFile(job.plan) as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the package is chosen at run time
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # the builder's C++ must not see an exception
                    write_errors.append(error)
                    return 0

        built = builder.build_serialized_network_to_stream(network, config, Writer())
    if cancelled():
        raise BuildError(f"Compiling {job.graph.name} was cancelled.")
    if write_errors:
        raise BuildError(f"{job.plan} could not be written ({write_errors[0].strerror}).")
    if not built:
        errors = [message.text for message in messages if message.severity == "error"]
        reason = errors[0] if errors else "the builder gave no reason"
        raise BuildError(f"TensorRT cannot compile {job.graph.name}: {reason}")


def _make_logger(trt: Any, record: Callable[[BuilderMessage], None]) -> Any:
    severities: dict[Any, Severity] = {
        trt.ILogger.INTERNAL_ERROR: "error",
        trt.ILogger.ERROR: "error",
        trt.ILogger.WARNING: "warning",
        trt.ILogger.INFO: "info",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # the package is chosen at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in severities:
                record(BuilderMessage(severities[severity], text.strip()))

    return Logger()


def _make_monitor(
    trt: Any,
    tree: PhaseTree,
    on_progress: Callable[[float, str], None],
    cancelled: Callable[[], bool],
) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the package is chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tree.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tree.step(phase_name, step)
            on_progress(tree.fraction, tree.current)
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            tree.finish(phase_name)
            on_progress(tree.fraction, tree.current)

    return Monitor()


def _spec(tensor: Any) -> TensorSpec:
    shape: list[int | str] = []
    for axis, size in enumerate(tensor.shape):
        shape.append(int(size) if size >= 0 else tensor.get_dimension_name(axis) or f"dim{axis}")
    return TensorSpec(name=tensor.name, dtype=_DTYPE_NAMES[tensor.dtype.name], shape=tuple(shape))
