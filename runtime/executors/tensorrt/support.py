"""Whether the `tensorrt` executor can run a bundle here; imports nothing that may be missing."""

from dataclasses import dataclass
from importlib.util import find_spec

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BundleError
from framesink.runtime.gpu import current_sm
from framesink.runtime.manifest import PartName, PlanSpec


@dataclass(frozen=True, slots=True)
class FittingPlans:
    """The plans of both parts for the GPU of this machine and the installed package."""

    vision_encoder: PlanSpec
    language_model: PlanSpec

    def __str__(self) -> str:
        plan = self.language_model
        return f"{plan.path} through {plan.builder} {plan.builder_version}"


def find_plans(bundle: Bundle) -> FittingPlans:
    """The plans that can run here.

    Raises BundleError, in one sentence, where there is no GPU, no plan for it, no package of the
    version that built one, or no torch with CUDA.
    """
    sm = current_sm()
    plans = FittingPlans(
        vision_encoder=_fitting_plan(bundle, "vision_encoder", sm),
        language_model=_fitting_plan(bundle, "language_model", sm),
    )
    if find_spec("torch") is None:
        raise BundleError(
            "The tensorrt executor keeps its GPU memory in torch, which is not installed; install "
            "framesink[cuda]."
        )
    import torch

    if not torch.cuda.is_available():
        raise BundleError(
            "The tensorrt executor keeps its GPU memory in torch, and the torch that is installed "
            "finds no CUDA; install framesink[cuda]."
        )
    return plans


def why_not_tensorrt(bundle: Bundle) -> str | None:
    """What stands against it, as the end of a sentence; None if nothing does."""
    try:
        find_plans(bundle)
    except BundleError as error:
        return str(error).rstrip(".")
    return None


def _fitting_plan(bundle: Bundle, part: PartName, sm: str | None) -> PlanSpec:
    """The first plan of a part for this GPU whose builder is installed in its version."""
    bundle.plan_for(part, sm)  # raises where there is no GPU, or no plan for it
    refusals = []
    for plan in bundle.manifest.part(part).plans:
        if sm not in plan.targets:
            continue
        try:
            bundle.check_version(plan)
        except BundleError as error:
            refusals.append(error)
        else:
            return plan
    raise refusals[0]
