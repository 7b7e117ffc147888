"""What a build quantizes and how it will be judged, decided before any work."""

from dataclasses import dataclass
from importlib.util import find_spec

from framesink.build.device import INSTALL_HINT, check_device
from framesink.build.gate import DEFAULT_GATE, QualityGate
from framesink.build.options import BuildOptions, ObserverName
from framesink.build.precision import check_agreement
from framesink.build.quality import open_reference
from framesink.build.source import BuildInput
from framesink.calibration.quantize import needs_statistics
from framesink.calibration.recipe import Recipe
from framesink.runtime.errors import BuildError, OptionError
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
)


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """`quantization` is what the bundle will have, `recipe` how the checkpoint has to be quantized
    for it (None: not at all) and `calibrate` whether on video, `gate` what it must reach (None:
    nothing is measured), `notes` what a person should know of it."""

    quantization: Quantization
    recipe: Recipe | None
    calibrate: bool
    gate: QualityGate | None
    notes: tuple[str, ...]


def plan_quantization(options: BuildOptions, source: BuildInput) -> QuantizationPlan:
    """Decide what to quantize from the options and the checkpoint.

    Raises BuildError for options that contradict a checkpoint quantized already or each other, and
    if torch is missing where it is needed; OptionError for a recipe, observer or device that cannot
    be used; and what `open_reference` raises for a `gate_checkpoint` that is none.
    """
    if not options.judge and (options.gate is not None or options.gate_checkpoint is not None):
        raise BuildError("--no-gate contradicts --gate and --gate-checkpoint; leave one out.")
    config, found = source.checkpoint.config, source.checkpoint.quantization
    recipe: Recipe | None = None
    if found is not None:
        check_agreement(options, config, found)
    elif options.quantizes:
        recipe = _choose_recipe(options)
    elif options.observer is not None:
        raise BuildError("--observer has no effect where nothing is quantized; leave it out.")
    quantization = found or (recipe.resolve(config) if recipe else Quantization())
    if recipe is not None and options.observer is not None and not options.compare:
        _check_observer(options.observer, quantization)
    gate, notes = _choose_gate(options, quantization, already=found is not None)
    if gate is not None and options.gate_checkpoint is not None:
        open_reference(options.gate_checkpoint, config)
    if options.compare and found is not None:
        raise BuildError(
            f"--compare simulates every precision of a 16-bit checkpoint, and {options.checkpoint} "
            "is quantized already; leave it out, or give the 16-bit checkpoint."
        )
    calibrate = options.compare or (recipe is not None and needs_statistics(quantization))
    if calibrate:
        check_device(options.device)
    elif gate is not None and find_spec("torch") is None:
        raise BuildError(
            f"The quality gate needs torch; install it with {INSTALL_HINT}, or pass --no-gate."
        )
    return QuantizationPlan(quantization, recipe, calibrate, gate, notes)


def _check_observer(observer: ObserverName, quantization: Quantization) -> None:
    """SmoothQuant changes what INT8 layers see, and K/V rows may not saturate at all."""
    if LinearScheme.FP8 not in quantization.linears.values():
        raise OptionError(
            f"--observer {observer} has no effect: it chooses the input ranges of FP8 layers, and "
            "no layer is to be in FP8; leave it out."
        )


def _choose_recipe(options: BuildOptions) -> Recipe:
    """The recipe given, or the one that the precisions given stand for."""
    if options.recipe is None:
        language = options.precision or "fp16"
        return Recipe(
            language_model=language,
            head=options.head_precision or "fp16",
            vision_encoder=options.vision_precision or language,
            kv_cache=options.kv_precision or "fp16",
        )
    for option, value in (
        ("--precision", options.precision),
        ("--head-precision", options.head_precision),
        ("--vision-precision", options.vision_precision),
        ("--kv-precision", options.kv_precision),
    ):
        if value is not None:
            raise BuildError(
                f"--recipe says all precisions itself; leave {option} {value} out, or write it "
                f"into {options.recipe}."
            )
    return Recipe.read(options.recipe)


def is_quantized(quantization: Quantization) -> bool:
    """Whether anything is quantized at all."""
    return quantization.cache is not CacheScheme.UNQUANTIZED or any(
        scheme is not LinearScheme.UNQUANTIZED for scheme in quantization.linears.values()
    )


def _choose_gate(
    options: BuildOptions, quantization: Quantization, *, already: bool
) -> tuple[QualityGate | None, tuple[str, ...]]:
    """The gate to pass, if any. A checkpoint quantized already lacks what to compare with."""
    if not options.judge or not (is_quantized(quantization) or options.gate is not None):
        return None, ()
    if already and options.gate_checkpoint is None:
        if options.gate is not None:
            raise BuildError(
                f"--gate compares with the 16-bit checkpoint and {options.checkpoint} is quantized "
                "already; name the other with --gate-checkpoint."
            )
        note = (
            f"The quality gate was not run, as {options.checkpoint} is quantized already; pass "
            "--gate-checkpoint with the 16-bit checkpoint to run it."
        )
        return None, (note,)
    return options.gate or DEFAULT_GATE, ()
