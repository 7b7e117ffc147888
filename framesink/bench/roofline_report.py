"""What a GPU could do at a model's sizes, and how near the kernels come to it."""

from dataclasses import dataclass

from rich.table import Table

from framesink.bench.floors import ChunkFloor
from framesink.bench.precisions import Precision


@dataclass(frozen=True, slots=True)
class ProductTime:
    """One linear layer at one number of rows; seconds, measured and at the roofline."""

    name: str
    channels: int
    depth: int
    rows: int
    seconds: float
    floor: float


@dataclass(frozen=True, slots=True)
class StepFloor:
    """The least time of one step of the language model, or of the vision encoder: `linear` seconds
    for its linear layers and `attention` seconds, for contexts of `RooflineReport.context` tokens.
    `measured` is what the linear layers took together."""

    kind: str
    sequences: int
    rows: int
    linear: float
    attention: float
    measured: float


@dataclass(frozen=True, slots=True)
class RooflineReport:
    """`bandwidth` is bytes read a second, `operations` operations a second of a large product by
    precision. Times are seconds. `chunk` is the least time of a chunk alone, `live_streams` how
    many streams with a chunk a second fill a second."""

    workload: str
    precision: str
    context: int
    bandwidth: float
    operations: dict[Precision, float]
    products: tuple[ProductTime, ...]
    steps: tuple[StepFloor, ...]
    chunk: ChunkFloor
    live_streams: int


def roofline_table(report: RooflineReport) -> Table:
    """Every product against its floor, and all linear layers of a step; behind a step's floor is
    that of its attention."""
    rates = ", ".join(f"{rate / 1e12:,.0f} {name}" for name, rate in report.operations.items())
    title = (
        f"{report.workload}, {report.precision}: {report.bandwidth / 1e12:.2f} TB/s, "
        f"T operations/s: {rates}"
    )
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    table.add_column("")
    for name in ("rows", "measured", "floor", "ratio"):
        table.add_column(name, justify="right")
    for product in report.products:
        table.add_row(
            f"{product.name} {product.channels:,}×{product.depth:,}",
            f"{product.rows:,}",
            f"{product.seconds * 1e6:.1f} µs",
            f"{product.floor * 1e6:.1f} µs",
            f"{product.seconds / product.floor:.2f}×",
        )
    table.add_section()
    for step in report.steps:
        after = f", {step.sequences} × {report.context:,} tokens"
        table.add_row(
            f"linear of {step.kind}{after if step.sequences else ''}",
            f"{step.rows:,}",
            f"{step.measured * 1e3:.2f} ms",
            f"{step.linear * 1e3:.2f} ms + {step.attention * 1e3:.2f}",
            f"{step.measured / step.linear:.2f}×",
        )
    table.add_section()
    floor = report.chunk
    for name, seconds in (("TTFT", floor.ttft), ("chunk", floor.chunk)):
        table.add_row(name, "", "", f"{seconds * 1e3:.1f} ms", "")
    table.add_row("streams that fill a second", "", "", str(report.live_streams), "")
    return table
