"""Tables about a calibration: what was seen, what was written, which layers suffer most."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from framesink.build.precision import scheme_name
from framesink.calibration.quantize import QuantizeSummary
from framesink.calibration.statistics import Statistics
from framesink.cli.calibration_run import RECIPE_NAME, CalibrationResult
from framesink.cli.summary import format_bytes, print_accuracy
from framesink.runtime.models.quantization import CacheScheme

if TYPE_CHECKING:
    from framesink.calibration.sensitivity import GroupSensitivity, SensitivityReport

SHOWN_GROUPS = 12
SHOWN_NAMES = 3


def print_calibration(result: CalibrationResult, console: Console) -> None:
    """Everything about a finished calibration."""
    if result.sensitivity is not None:
        _print_sensitivity(result.sensitivity, result.kept, console)
    if result.accuracy is not None:
        print_accuracy(result.accuracy, console)
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    facts = [*_describe_statistics(result.statistics), *_describe_summary(result.summary)]
    for name, value in facts:
        table.add_row(name, escape(value))
    console.print(table)
    for reason, names in result.summary.replaced.items():
        console.print(
            f"{reason}: {_shorten(names)}.",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    console.print(
        f"{result.output}: {format_bytes(result.summary.bytes_after)} of weights; "
        f"{RECIPE_NAME} in it says what was quantized.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _describe_statistics(statistics: Statistics | None) -> Iterable[tuple[str, str]]:
    if statistics is None:
        return [("observed", "nothing, as only weights are quantized")]
    return [
        ("observed", f"{statistics.chunks} chunks of {statistics.source}"),
        (
            "tokens, patches",
            f"{statistics.layers[0].rows:,}, "
            f"{statistics.linears['visual.patch_embed.proj'].rows:,}",
        ),
        (
            "channels seen",
            f"{statistics.dead_channels} dead, {statistics.constant_channels} constant",
        ),
    ]


def _describe_summary(summary: QuantizeSummary) -> Iterable[tuple[str, str]]:
    counts = sorted(summary.linears.items(), key=lambda entry: -entry[1])
    linears = ", ".join(f"{count} in {scheme_name(scheme)}" for scheme, count in counts)
    yield "linear layers", linears or "16 bits"
    cache = summary.cache
    yield "K/V cache", "16 bits" if cache is CacheScheme.UNQUANTIZED else cache.value
    clamped = (summary.dead_rows, summary.dead_inputs, summary.dead_cache)
    yield (
        "clamped scales",
        "{} of weight rows, {} of input channels, {} of the cache".format(*clamped),
    )
    if summary.alphas:
        alphas = summary.alphas.values()
        yield "SmoothQuant α", f"{min(alphas):.2f} to {max(alphas):.2f}"
    yield "layout", summary.layout.value
    before, after = format_bytes(summary.bytes_before), format_bytes(summary.bytes_after)
    yield "weights", f"{before} before, {after} now"


def _print_sensitivity(
    report: "SensitivityReport", kept: "tuple[GroupSensitivity, ...]", console: Console
) -> None:
    table = Table(title="Damage of quantizing these layers alone", title_justify="left")
    table.add_column("layers", overflow="fold")
    table.add_column("mean KL", justify="right", no_wrap=True)
    table.add_column("top-1", justify="right", no_wrap=True)
    table.add_column("in 16 bits", justify="right", no_wrap=True)
    for group in report.groups[:SHOWN_GROUPS]:
        table.add_row(
            escape(_shorten(group.linears)),
            f"{group.kl:.2e}",
            f"{group.agreement.top1:.1%}",
            f"+{format_bytes(group.extra_bytes)}",
            style="bold" if group in kept else None,
        )
    console.print(table)
    others = len(report.groups) - SHOWN_GROUPS
    if others > 0:
        console.print(f"and {others} less damaging", highlight=False)
    console.print(
        f"All together: mean KL {report.together.kl:.2e}, top-1 {report.together.top1:.1%} over "
        f"{report.chunks} chunks.",
        highlight=False,
    )
    names = tuple(name for group in kept for name in group.linears)
    size = format_bytes(sum(group.extra_bytes for group in kept))
    console.print(
        f"Kept in 16 bits, for {size} more: {_shorten(names)}."
        if kept
        else "Kept in 16 bits: none.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _shorten(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown} and {len(names) - SHOWN_NAMES} more"
