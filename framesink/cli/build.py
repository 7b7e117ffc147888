"""`framesink build`, also known as `build-engines`."""

from pathlib import Path
from typing import Any

import click

from framesink.cli.main import SentenceCommand

POSITIVE = click.IntRange(min=1)
PRECISION = click.Choice(["fp16", "fp8", "int8", "int8-weight-only", "int4-weight-only"])


@click.command(cls=SentenceCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of the engine bundle.",
)
@click.option(
    "--precision",
    type=PRECISION,
    help="Of the language model's linear layers.  [default: fp16, or what MODEL_DIR has]",
)
@click.option(
    "--head-precision",
    type=PRECISION,
    help="Of the projection to the vocabulary.  [default: fp16, or what MODEL_DIR has]",
)
@click.option("--vision-precision", type=PRECISION, help="Of the vision encoder, if it differs.")
@click.option(
    "--kv-precision",
    type=click.Choice(["fp16", "int8", "fp8"]),
    help="Of the K/V pages.  [default: fp16, or what MODEL_DIR has]",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="File that says layer by layer what is quantized, as framesink calibrate writes it.",
)
@click.option(
    "--observer",
    type=click.Choice(["absmax", "percentile", "mse"]),
    help="How the ranges of FP8 layers' inputs are chosen.  [default: absmax]",
)
@click.option(
    "--gate",
    metavar="top1=X,kl=Y",
    help="Least top-1 agreement and largest mean KL divergence from MODEL_DIR that a bundle may "
    "have.  [default: top1=0.98,kl=0.02 for a quantized bundle]",
)
@click.option("--no-gate", is_flag=True, help="Do not compare the bundle with MODEL_DIR.")
@click.option(
    "--gate-checkpoint",
    type=click.Path(path_type=Path),
    help="The 16-bit checkpoint to compare with, if MODEL_DIR is quantized already.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Measure every other precision too, in simulation, and put the table into the bundle.",
)
@click.option(
    "--with-checkpoint",
    is_flag=True,
    help="Put a checkpoint into the bundle, too, for the tensorrt_llm executor.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="SM[,SM…]",
    help="Architectures to compile for: sm80, sm86, sm89, sm120, current.",
)
@click.option(
    "--calibration-video",
    "calibration_videos",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Video, or folder of videos, to observe the model on; may be given again. A part of it is "
    "held back for the quality gate.  [default: MODEL_DIR/calibration, or a generated scene]",
)
@click.option(
    "--calibration-chunks",
    type=POSITIVE,
    help="Most chunks of it to calibrate on.  [default: 256]",
)
@click.option("--device", help="Where torch runs the model, such as cuda.  [default: cpu]")
@click.option("--max-streams", type=POSITIVE, help="Streams in one step.  [default: 8]")
@click.option("--max-context", type=POSITIVE, help="Tokens of a stream.  [default: 16384]")
@click.option("--max-prefill", type=POSITIVE, help="New tokens in one step.  [default: 1024]")
@click.option("--max-patches", type=POSITIVE, help="ViT patches at once.  [default: one chunk]")
@click.option("--page-size", type=POSITIVE, help="K/V rows of a page.  [default: 16]")
@click.option("--no-plans", is_flag=True, help="No TensorRT: a bundle for ONNX Runtime alone.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--verbose", is_flag=True, help="Print every message of the builder.")
def build(
    model_dir: Path,
    output: Path,
    gate: str | None,
    no_gate: bool,
    no_plans: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Build an engine bundle from the checkpoint in MODEL_DIR.

    Observes the model's activations, quantizes it where that is asked for, writes its weights and
    graphs, compares them with the checkpoint, and compiles both parts to TensorRT plans. Nothing
    is left behind when it fails or is interrupted.
    """
    from rich.console import Console

    from framesink.build.gate import QualityGate
    from framesink.build.options import BuildOptions
    from framesink.build.pipeline import build_bundle
    from framesink.cli.progress import RichReporter
    from framesink.cli.summary import print_build_summary

    targets = [
        name.strip() for value in options.pop("targets") for name in value.split(",") if name
    ]
    given = {name: value for name, value in options.items() if value is not None}
    build_options = BuildOptions(
        checkpoint=model_dir,
        output=output,
        targets=tuple(targets),
        plans=not no_plans,
        gate=None if gate is None else QualityGate.parse(gate),
        judge=not no_gate,
        **given,
    )
    with RichReporter(Console(stderr=True), verbose=verbose) as reporter:
        summary = build_bundle(build_options, reporter)
    print_build_summary(summary, Console())
