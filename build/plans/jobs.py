"""What goes to the compiling process and what comes back, as lines of JSON."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from framesink.build.plans.builder import BuilderName
from framesink.runtime.manifest import OptimizationProfile, TensorSpec


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CompileJob(_Model):
    """One graph to compile. Its external weights are found beside it."""

    graph: Path
    plan: Path
    builder: BuilderName
    targets: tuple[str, ...]
    profiles: tuple[OptimizationProfile, ...]


class Progress(_Model):
    """How far the builder is (0 to 1) and the innermost phase it is in."""

    kind: Literal["progress"] = "progress"
    fraction: float
    phase: str


class Message(_Model):
    """Something the builder said."""

    kind: Literal["message"] = "message"
    severity: Literal["error", "warning", "info"]
    text: str


class CompiledPlan(_Model):
    """A finished plan: its interface, its size in bytes, and the seconds it took."""

    kind: Literal["compiled"] = "compiled"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    builder_version: str
    plan_bytes: int
    seconds: float


class Failure(_Model):
    """Why there is no plan, in one sentence."""

    kind: Literal["failure"] = "failure"
    sentence: str


WorkerEvent = Progress | Message | CompiledPlan | Failure
EVENT_ADAPTER: TypeAdapter[WorkerEvent] = TypeAdapter(
    Annotated[WorkerEvent, Field(discriminator="kind")]
)
