"""Draw files of results against their floors and other systems.

pip install matplotlib
python scripts/plot_results.py docs/results/w720-h200-*.json -o docs/w720-h200.svg
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from framesink.bench.figures import ChunkParts, ResultFigures, read_figures

# The same workload on the same GPU: milliseconds per chunk and live streams.
OTHERS = {
    "vLLM 0.22, FP8,\nwindow sent anew": (326.0, 3),
    "StreamingVLM's\nown code, BF16": (1623.0, 0),
}
# Readable on white and on black.
TEXT = "#7d8590"
GRID = "#7d859040"
COLOURS = {"vision": "#2f81f7", "prefill": "#8957e5", "decode": "#2da44e", "host": "#bf8700"}
LIVE = "#1b9aaa"
OTHER = "#8b949e"
LABELS = {
    "vision": "vision encoder",
    "prefill": "prefill",
    "decode": "19 decode steps",
    "host": "GPU waits for the host",
}
# Bars that are longer are cut, and say so.
LONGEST_MS = 350.0


@click.command()
@click.argument(
    "results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("w720-h200.svg"))
def main(results: tuple[Path, ...], output: Path) -> None:
    """Draw RESULTS, files that `framesink bench --results` made."""
    found = [figures for path in results if (figures := read_figures(path)) is not None]
    found.sort(key=lambda figures: figures.chunk.total)
    if not found:
        raise click.UsageError("None of these files has a chunk that was measured on a GPU.")
    mpl.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "framesink",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": GRID,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    rows = 2 * len(found) + len(OTHERS)
    figure = Figure(figsize=(9.6, 1.6 + 0.42 * rows), layout="constrained")
    chunks, streams = figure.subplots(1, 2, width_ratios=(3, 1.6), sharey=True)
    draw_chunks(chunks, found)
    draw_streams(streams, found)
    figure.suptitle(f"W720 on one {found[0].gpu}", color=TEXT, fontsize=12)
    figure.savefig(output, transparent=True, metadata={"Date": None} if is_svg(output) else None)


def is_svg(path: Path) -> bool:
    """By its name."""
    return path.suffix == ".svg"


def names(found: Sequence[ResultFigures]) -> list[str]:
    """The rows, from the top."""
    ours = [
        name
        for figures in found
        for name in (f"framesink, {short(figures)}", f"floor, {short(figures)}")
    ]
    return [*ours, *OTHERS]


def short(figures: ResultFigures) -> str:
    """The precision of the linear layers, and of K/V if those are in one byte."""
    blocks, _, cache, _ = (part.split()[0].upper() for part in figures.precision.split(", "))
    return blocks if cache == "BF16" else f"{blocks}, K/V {cache}"


def draw_chunks(axes: Axes, found: Sequence[ResultFigures]) -> None:
    """Time per chunk, split."""
    bars = [parts for figures in found for parts in (figures.chunk, figures.floor)]
    for row, parts in enumerate(bars):
        draw_parts(axes, row, parts, faint=bool(row % 2))
    for row, (chunk, _) in enumerate(OTHERS.values(), start=len(bars)):
        axes.barh(row, min(chunk, LONGEST_MS), height=0.62, color=OTHER)
        cut = "" if chunk <= LONGEST_MS else " →"
        say(axes, min(chunk, LONGEST_MS), row, f"{chunk:,.0f}{cut}")
    axes.set_yticks(range(len(bars) + len(OTHERS)), names(found))
    axes.invert_yaxis()
    axes.set_xlim(0, LONGEST_MS * 1.13)
    axes.set_xlabel("one stream: milliseconds per chunk, p50")
    handles = [mpl.patches.Patch(color=COLOURS[name], label=LABELS[name]) for name in COLOURS]
    axes.legend(handles=handles, loc="upper right", frameon=False, labelcolor=TEXT)
    tidy(axes)


def draw_parts(axes: Axes, row: int, parts: ChunkParts, *, faint: bool) -> None:
    """One bar of a chunk's parts; a floor is thinner."""
    left = 0.0
    for field in fields(parts):
        width = getattr(parts, field.name)
        axes.barh(
            row,
            width,
            left=left,
            height=0.34 if faint else 0.62,
            color=COLOURS[field.name],
            alpha=0.55 if faint else 1.0,
            linewidth=0,
        )
        left += width
    say(axes, left, row, f"{left:.1f}")


def draw_streams(axes: Axes, found: Sequence[ResultFigures]) -> None:
    """Live streams."""
    counts: list[tuple[int | None, bool]] = []
    for figures in found:
        counts += [(figures.live, False), (figures.live_floor, True)]
    rows = [*counts, *((count, False) for _, count in OTHERS.values())]
    for row, (count, faint) in enumerate(rows):
        if count is None:
            say(axes, 0, row, "" if faint else "not measured")
            continue
        ours = row < len(counts)
        axes.barh(
            row,
            count,
            height=0.34 if faint else 0.62,
            color=LIVE if ours else OTHER,
            alpha=0.55 if faint else 1.0,
            linewidth=0,
        )
        say(axes, count, row, str(count))
    axes.set_xlabel("live streams, p99 < 1 s")
    axes.set_xlim(0, 1.15 * max(count or 0 for count, _ in rows))
    axes.tick_params(axis="y", length=0)
    tidy(axes)


def say(axes: Axes, end: float, row: int, text: str) -> None:
    """A bar's figure, behind it."""
    axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center")


def tidy(axes: Axes) -> None:
    """Lines to read along, and no box."""
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


if __name__ == "__main__":
    main()
