"""Compile one model part of a bundle in a process of its own."""

from dataclasses import dataclass
from pathlib import Path

from framesink.build.plans.builder import PlanBuilder
from framesink.build.plans.jobs import CompileJob
from framesink.build.plans.messages import BuilderMessage
from framesink.build.plans.process import compile_in_process
from framesink.build.plans.profiles import language_model_profiles, vision_profiles
from framesink.build.reporter import Reporter, StageResult
from framesink.runtime.manifest import GraphSpec, Limits, PartName, PlanSpec
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import PreprocessConfig


@dataclass(frozen=True, slots=True)
class PartCompiler:
    """Compiles the parts of the bundle in `directory`, for `targets`."""

    directory: Path
    builder: PlanBuilder
    targets: tuple[str, ...]
    limits: Limits
    page_size: int
    config: ModelConfig
    preprocess: PreprocessConfig

    def compile(
        self, part: PartName, graph: GraphSpec, plan: str, reporter: Reporter
    ) -> tuple[PlanSpec, StageResult]:
        """Compile a part's `graph` to the file `plan` of the bundle.

        Raises BuildError if the builder refuses it.
        """
        name = f"compile {part}"
        reporter.stage(name)
        profiles = (
            language_model_profiles(graph.inputs, self.limits, self.page_size)
            if part == "language_model"
            else vision_profiles(graph.inputs, self.limits, self.config.vision, self.preprocess)
        )

        def log(message: BuilderMessage) -> None:
            reporter.log(f"{self.builder.name} {message.severity}: {message.text}")

        result, peak_memory = compile_in_process(
            CompileJob(
                graph=self.directory / graph.path,
                plan=self.directory / plan,
                builder=self.builder.name,
                targets=self.targets,
                profiles=profiles,
            ),
            on_progress=reporter.progress,
            on_message=log,
        )
        spec = PlanSpec(
            path=plan,
            builder=self.builder.name,
            builder_version=result.builder_version,
            targets=self.targets,
            compute_type=graph.compute_type,
            inputs=result.inputs,
            outputs=result.outputs,
            profiles=profiles,
        )
        return spec, StageResult(name, result.seconds, peak_memory)
