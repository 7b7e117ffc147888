"""Tables about bundles: what a build made, and what a bundle holds."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from framesink.build.accuracy import AccuracyTable, read_accuracy
from framesink.build.estimate import graph_weights
from framesink.build.gate import read_verification
from framesink.build.precision import scheme_name
from framesink.build.reporter import BuildSummary
from framesink.runtime.bundle import Bundle
from framesink.runtime.manifest import PART_NAMES, Manifest, PartSpec


def print_build_summary(summary: BuildSummary, console: Console) -> None:
    """Parts and stages of a finished build."""
    _print_parts(summary.manifest, console)
    stages = Table("stage", title="Stages", title_justify="left")
    stages.add_column("time", justify="right")
    stages.add_column("peak memory", justify="right")
    for stage in summary.stages:
        stages.add_row(stage.name, f"{stage.seconds:.1f} s", format_bytes(stage.peak_memory))
    console.print(stages)
    _print_measurements(Bundle(summary.output, summary.manifest), console)
    for note in summary.notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    plans = summary.manifest.language_model.plans
    if plans:
        console.print(
            f"Compiled by {plans[0].builder} {plans[0].builder_version}.", highlight=False
        )
    size = format_bytes(sum(file.size for file in summary.manifest.files.values()))
    console.print(f"{summary.output}: {size}", highlight=False, markup=False, soft_wrap=True)


def print_bundle(bundle: Bundle, console: Console) -> None:
    """All a person wants to know of a bundle."""
    manifest = bundle.manifest
    text, vision = manifest.model.text, manifest.model.vision
    limits, streaming = manifest.limits, manifest.streaming
    facts = {
        "bundle": str(bundle.directory),
        "model": f"{manifest.model_name} ({manifest.model.model_type})",
        "built": f"{manifest.created} by framesink {manifest.framesink_version}",
        "language model": f"{text.num_hidden_layers} layers, hidden {text.hidden_size}, "
        f"{text.num_attention_heads} heads ({text.num_key_value_heads} KV), "
        f"vocabulary {text.vocab_size}",
        "vision encoder": f"{vision.depth} blocks, hidden {vision.hidden_size}, "
        f"{vision.num_heads} heads, patch {vision.patch_size}",
        "frames": f"{manifest.preprocess.fps:g} per second, {manifest.preprocess.min_pixels:,} to "
        f"{manifest.preprocess.max_pixels:,} pixels",
        "K/V pages": f"{manifest.cache_precision} ({manifest.language_model.executed.page_type} in "
        f"ONNX Runtime, {manifest.language_model.compiled.page_type} in TensorRT), "
        f"{manifest.page_size} rows each",
        "limits": f"{limits.max_streams} streams, context {limits.max_context}, "
        f"prefill {limits.max_prefill}, {limits.max_patches} patches",
        "streaming": f"chunks of {streaming.chunk_seconds:g} s, window "
        f"{streaming.vision_seconds:g} s vision, {streaming.sink_text} + {streaming.recent_text} "
        f"text, replies of {streaming.reply_turns} turns",
        "query": streaming.query or "none",
        "checkpoint": f"{manifest.checkpoint}/, for TensorRT-LLM"
        if manifest.checkpoint
        else "none",
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
    }
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    console.print(table)
    _print_parts(manifest, console)
    _print_measurements(bundle, console)
    size = format_bytes(sum(file.size for file in manifest.files.values()))
    console.print(f"{len(manifest.files)} files, {size}", highlight=False)


def format_bytes(size: int) -> str:
    """A size in the unit that suits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def print_accuracy(table: AccuracyTable, console: Console) -> None:
    """What each choice of precision costs, and what that was measured on."""
    (_, _, *heading), *rows = table.cells()
    printed = Table("precision", title="Accuracy", title_justify="left")
    for name in heading:
        printed.add_column(escape(name), justify="right", overflow="fold")
    for language, vision, *cells in rows:
        weights = language if vision == language else f"{language}, vision {vision}"
        printed.add_row(*(escape(cell) for cell in (weights, *cells)))
    console.print(printed)
    for sentence in (table.description, *table.notes):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _print_measurements(bundle: Bundle, console: Console) -> None:
    """What was measured against the 16-bit checkpoint, if anything was."""
    table = read_accuracy(bundle)
    if table is not None:
        print_accuracy(table, console)
    measured = read_verification(bundle)
    if measured is not None:
        console.print(
            f"Against {measured.reference} over {measured.tokens} tokens of {measured.chunks} "
            f"chunks ({measured.source}): top-1 agreement {measured.top1:.2%}, mean KL "
            f"{measured.kl:.4g} nats (asked: {measured.gate}).",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _print_parts(manifest: Manifest, console: Console) -> None:
    """The parts with the compute type of either reader, and their plans."""
    parts = Table(title="Parts", title_justify="left")
    for column in ("part", "precision", "ONNX Runtime", "TensorRT"):
        parts.add_column(column, no_wrap=True)
    parts.add_column("linear layers")
    plans = Table(title="Plans", title_justify="left")
    for column in ("part", "targets"):
        plans.add_column(column)
    for column in ("size", "bytes per weight"):
        plans.add_column(column, justify="right", no_wrap=True)
    for name in PART_NAMES:
        part = manifest.part(name)
        compiled = part.compiled.compute_type if part.plans else "no plan"
        linears = _describe_linears(part)
        parts.add_row(name, part.precision, part.executed.compute_type, compiled, linears)
        for plan in part.plans:
            size = manifest.files[plan.path].size
            plans.add_row(
                name,
                ", ".join(plan.targets),
                format_bytes(size),
                f"{size / graph_weights(manifest.model, name):.2f}",
            )
    console.print(parts)
    if plans.row_count:
        console.print(plans)


def _describe_linears(part: PartSpec) -> str:
    """How many linear layers are held in which scheme, most first."""
    counts = sorted(part.linears.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{count} in {scheme_name(scheme)}" for scheme, count in counts)
