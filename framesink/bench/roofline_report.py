"""What a GPU could do at a model's sizes, and how near the kernels come to it."""

from dataclasses import dataclass

from rich.table import Table


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
    """The least time of one step of the language model: `linear` seconds for its linear layers and
    `attention` seconds for contexts of `RooflineReport.context` tokens. `measured` is what the
    linear layers took together."""

    kind: str
    sequences: int
    rows: int
    linear: float
    attention: float
    measured: float


@dataclass(frozen=True, slots=True)
class RooflineReport:
    """`bandwidth` bytes a second of a large copy, read and written; `peak` and `peak_16bit`
    operations a second of a large product in `precision` and in bfloat16. Times are seconds."""

    workload: str
    precision: str
    context: int
    bandwidth: float
    peak: float
    peak_16bit: float
    products: tuple[ProductTime, ...]
    steps: tuple[StepFloor, ...]


def roofline_table(report: RooflineReport) -> Table:
    """Every product and every step against its floor."""
    title = (
        f"{report.workload}, {report.precision}: {report.bandwidth / 1e12:.2f} TB/s, "
        f"{report.peak / 1e12:,.0f} T operations/s ({report.peak_16bit / 1e12:,.0f} in bf16)"
    )
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    table.add_column("")
    for name in ("rows", "measured", "floor", "of the floor"):
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
        table.add_row(
            f"{step.kind}, {step.sequences} × {report.context:,} tokens of context",
            f"{step.rows:,}",
            f"{step.measured * 1e3:.2f} ms linear",
            f"{step.linear * 1e3:.2f} + {step.attention * 1e3:.2f} ms",
            f"{step.measured / step.linear:.2f}×",
        )
    return table
