"""Compiling an authored graph with TensorRT-RTX, without a GPU."""

from pathlib import Path

import onnx_ir

from framesink.build.plans.compile import compile_plan
from framesink.build.plans.jobs import CompiledPlan, CompileJob
from framesink.build.plans.profiles import language_model_profiles, vision_profiles
from framesink.runtime.manifest import Limits, TensorSpec
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import PreprocessConfig

LIMITS = Limits(max_streams=2, max_context=64, max_prefill=16, max_patches=64)


def compile_graph(
    graph: Path, config: ModelConfig, targets: tuple[str, ...], *, page_size: int = 4
) -> CompiledPlan:
    """The plan of a language model's or a vision encoder's graph, written beside it.

    Raises BuildError for a warning that can mean wrong numbers too.
    """
    inputs = input_specs(graph)
    is_vision = any(spec.name == "patches" for spec in inputs)
    return compile_plan(
        CompileJob(
            graph=graph,
            plan=graph.with_suffix(".plan"),
            builder="tensorrt_rtx",
            targets=targets,
            profiles=vision_profiles(inputs, LIMITS, config.vision, PreprocessConfig())
            if is_vision
            else language_model_profiles(inputs, LIMITS, page_size),
        ),
        on_progress=lambda fraction, phase: None,
        on_message=lambda message: None,
        cancelled=lambda: False,
    )


def input_specs(graph: Path) -> list[TensorSpec]:
    """Names, types and shapes of a graph's inputs."""
    return [
        TensorSpec(
            name=str(value.name),
            dtype=str(value.dtype),
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
        )
        for value in onnx_ir.load(graph).graph.inputs
    ]
