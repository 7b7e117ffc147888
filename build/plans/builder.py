"""Which TensorRT package compiles, and for which GPU architectures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from framesink.runtime.errors import BuildError
from framesink.runtime.gpu import current_sm

BuilderName = Literal["tensorrt", "tensorrt_rtx"]
BUILDER_NAMES: tuple[BuilderName, ...] = ("tensorrt", "tensorrt_rtx")
CURRENT = "current"
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
FP8_SM = 89  # the first architecture that multiplies FP8
INSTALL_HINT = "pip install 'framesink[rtx]'"


@dataclass(frozen=True, slots=True)
class PlanBuilder:
    """A TensorRT package that is installed and starts on this machine.

    `targets` are the SM names it can compile for here. `cross_compiles` says whether it takes a
    list of architectures; full TensorRT compiles only for the GPU that is in the machine.
    """

    name: BuilderName
    version: str
    targets: tuple[str, ...]
    cross_compiles: bool


def load_module(name: BuilderName) -> Any:
    """Import a builder's package."""
    return import_module(name)


def find_builders() -> list[PlanBuilder]:
    """The usable builders of this machine, the preferred one first."""
    found = (_probe(name) for name in BUILDER_NAMES)
    return [builder for builder in found if builder is not None]


def choose_builder(
    requested: Sequence[str],
    builders: Sequence[PlanBuilder] | None = None,
    *,
    fp8: bool = False,
) -> tuple[PlanBuilder, tuple[str, ...]]:
    """The first builder that knows every requested architecture, and the architectures' SM names.

    `requested` holds SM names and `current`; empty means the GPU of this machine for full TensorRT,
    and all common architectures for TensorRT-RTX. With `fp8` they must be able to multiply FP8;
    those meant by default are taken as far as they are. Raises BuildError when no builder is
    installed, none knows them all, or one of them lacks FP8.
    """
    available = find_builders() if builders is None else builders
    if not available:
        raise BuildError(
            f"No TensorRT is installed, so no plan can be compiled; install one with "
            f"{INSTALL_HINT}, or pass --no-plans to write a bundle for ONNX Runtime alone."
        )
    targets = resolve_targets(requested)
    if fp8:
        _check_fp8(targets)
    for builder in available:
        if not targets:
            return builder, default_targets(builder, fp8=fp8)
        if set(targets) <= set(builder.targets):
            return builder, targets
    known = sorted({target for builder in available for target in builder.targets}, key=_sm_number)
    unknown = [target for target in targets if target not in known]
    abilities = "; ".join(f"{b.name} {b.version} knows {', '.join(b.targets)}" for b in available)
    if unknown:
        raise BuildError(f"No installed builder compiles for {', '.join(unknown)}: {abilities}.")
    raise BuildError(
        f"No single builder compiles for {', '.join(targets)} together: {abilities}; build one "
        "bundle per builder."
    )


def resolve_targets(requested: Sequence[str]) -> tuple[str, ...]:
    """SM names without repetition, in ascending order; `current` becomes the SM of this GPU.

    Raises BuildError for a name that is no SM and for `current` without a GPU.
    """
    targets: set[str] = set()
    for name in requested:
        if name == CURRENT:
            sm = current_sm()
            if sm is None:
                raise BuildError(
                    "The target 'current' needs a GPU and this machine has none; name the "
                    "architecture instead, such as --target sm89."
                )
            targets.add(sm)
        elif re.fullmatch(r"sm\d{2,3}", name):
            targets.add(name)
        else:
            raise BuildError(f"{name!r} is no target; write an architecture as sm89, or 'current'.")
    return tuple(sorted(targets, key=_sm_number))


def default_targets(builder: PlanBuilder, *, fp8: bool = False) -> tuple[str, ...]:
    """What a builder compiles for where nothing is asked for; with `fp8` as far as that has it.

    Raises BuildError if none has.
    """
    meant = builder.targets
    if builder.cross_compiles:
        meant = tuple(target for target in DEFAULT_TARGETS if target in builder.targets)
    if not fp8:
        return meant
    able = tuple(target for target in meant if supports_fp8(target))
    if not able:
        _check_fp8(meant)
    return able


def supports_fp8(target: str) -> bool:
    """Whether an architecture multiplies FP8."""
    return _sm_number(target) >= FP8_SM


def _check_fp8(targets: Sequence[str]) -> None:
    """Raises BuildError if one of the targets lacks FP8."""
    lacking = [target for target in targets if not supports_fp8(target)]
    if lacking:
        able = " and ".join(target for target in DEFAULT_TARGETS if supports_fp8(target))
        raise BuildError(
            f"FP8 does not run on {', '.join(lacking)}; compile for {able}, or choose int8, which "
            "runs on all of them."
        )


def _sm_number(name: str) -> int:
    return int(name.removeprefix("sm"))


def _probe(name: BuilderName) -> PlanBuilder | None:
    """A builder if its package imports and its library starts (full TensorRT needs a GPU)."""
    try:
        trt = load_module(name)
        if trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)) is None:
            return None
    except Exception:  # a stub package, a missing library or GPU: each raises its own kind
        return None
    if name == "tensorrt_rtx":
        members = trt.ComputeCapability.__members__
        names = [member.lower() for member in members if re.fullmatch(r"SM\d+", member)]
        return PlanBuilder(name, trt.__version__, tuple(sorted(names, key=_sm_number)), True)
    sm = current_sm()
    return None if sm is None else PlanBuilder(name, trt.__version__, (sm,), False)
