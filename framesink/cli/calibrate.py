"""`framesink calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framesink.cli.build import POSITIVE, PRECISION

if TYPE_CHECKING:
    from framesink.build.options import BuildOptions
    from framesink.calibration.recipe import CachePrecision, LinearPrecision


@click.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory of the quantized checkpoint, or of activation_ranges.json where nothing is "
    "quantized; in MODEL_DIR itself build-engines finds the latter.",
)
@click.option("--precision", type=PRECISION, help="Of the language model.  [default: fp16]")
@click.option(
    "--head-precision",
    type=PRECISION,
    help="Of the projection to the vocabulary.  [default: fp16]",
)
@click.option("--vision-precision", type=PRECISION, help="Of the vision encoder, if it differs.")
@click.option(
    "--kv-precision",
    type=click.Choice(["fp16", "int8", "fp8"]),
    help="Of the K/V cache.  [default: fp16]",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that says all of this layer by layer, as this command writes it.",
)
@click.option(
    "--observer",
    type=click.Choice(["absmax", "percentile", "mse"]),
    help="How the ranges of FP8 layers' inputs are chosen.  [default: absmax]",
)
@click.option(
    "--calibration-video",
    "videos",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Video, or folder of videos, to observe the model on; may be given again.  [default: "
    "MODEL_DIR/calibration, or a generated scene]",
)
@click.option("--chunks", type=POSITIVE, help="Most chunks of video to observe.  [default: 256]")
@click.option(
    "--min-chunks",
    type=POSITIVE,
    help="Refuse video that yields fewer.  [default: 16]",
)
@click.option(
    "--statistics",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory that keeps what was observed; what it has is used and not observed again.",
)
@click.option(
    "--layout",
    type=click.Choice(["framesink", "modelopt", "tensorrt-llm"]),
    help="Whose form the checkpoint has; vLLM and SGLang read ModelOpt's.  [default: framesink]",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Measure every precision in simulation, on video held back from calibration, and write "
    "the table beside the weights; build-engines takes it into the bundle.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Rank the layers by the damage that quantizing each alone does, on video held back from "
    "calibration.",
)
@click.option(
    "--keep-for-kl",
    type=click.FloatRange(min=0.0, min_open=True),
    metavar="NATS",
    help="With --sensitivity: keep the worst layers in 16-bit until the estimated mean KL "
    "divergence is at most this.",
)
@click.option(
    "--keep-bytes",
    type=POSITIVE,
    metavar="BYTES",
    help="With --sensitivity: keep the worst layers in 16-bit for at most so many bytes more.",
)
@click.option("--device", help="Where torch runs the model, such as cuda.  [default: cpu]")
@click.option("--force", is_flag=True, help="Replace an existing quantized checkpoint.")
def calibrate(
    model_dir: Path,
    output: Path,
    precision: "LinearPrecision | None",
    head_precision: "LinearPrecision | None",
    vision_precision: "LinearPrecision | None",
    kv_precision: "CachePrecision | None",
    recipe: Path | None,
    videos: tuple[Path, ...],
    force: bool,
    **options: Any,
) -> None:
    """Observe the checkpoint in MODEL_DIR on video, and quantize it.

    The model streams the video as it will be served: in chunks, with evictions and its own
    replies. Without a precision or recipe only the range of its activations is written.
    """
    from framesink.build.options import BuildOptions
    from framesink.runtime.errors import OptionError

    build = BuildOptions(
        checkpoint=model_dir,
        output=output,
        precision=precision,
        head_precision=head_precision,
        vision_precision=vision_precision,
        kv_precision=kv_precision,
        recipe=recipe,
        observer=options["observer"],
        judge=False,
        compare=options["compare"],
        force=force,
        calibration_videos=videos,
    )
    given = {name: value for name, value in options.items() if value not in (None, False)}
    if build.quantizes:
        _quantize(build, given)
        return
    if given:
        option = next(iter(given)).replace("_", "-")
        raise OptionError(
            f"--{option} has no effect where nothing is quantized; give a precision or a recipe."
        )
    _write_ranges(model_dir, output, videos)


def _quantize(build: "BuildOptions", given: dict[str, Any]) -> None:
    """Observe, rank if asked to, and write the quantized checkpoint."""
    from rich.console import Console

    from framesink.build.quantization_plan import plan_quantization
    from framesink.build.source import read_build_input
    from framesink.cli.calibration_run import CalibrationOptions, run_calibration
    from framesink.cli.calibration_summary import print_calibration
    from framesink.cli.progress import RichReporter
    from framesink.runtime.errors import CheckpointError, OutputError
    from framesink.runtime.models.quantization import QUANTIZATION_NAME
    from framesink.runtime.staging import check_output

    check_output(
        build.output,
        kind="quantized checkpoint",
        marker=QUANTIZATION_NAME,
        force=build.force,
        failure=OutputError,
    )
    source = read_build_input(build.checkpoint)
    if source.checkpoint.quantization is not None:
        raise CheckpointError(
            f"{build.checkpoint} is quantized already; calibrate the 16-bit checkpoint."
        )
    plan = plan_quantization(build, source)
    assert plan.recipe is not None
    with RichReporter(Console(stderr=True)) as reporter:
        result = run_calibration(build, CalibrationOptions(**given), source, plan.recipe, reporter)
    print_calibration(result, Console())


def _write_ranges(model_dir: Path, output: Path, videos: tuple[Path, ...]) -> None:
    """Observe the range of activations alone, in numpy, one layer's weights in memory at a time."""
    from rich.console import Console

    from framesink.build.footage import choose_videos
    from framesink.build.source import observe, read_build_input
    from framesink.calibration.ranges import FLOAT16_MAX
    from framesink.cli.progress import RichReporter
    from framesink.runtime.errors import BuildError
    from framesink.runtime.manifest import PART_NAMES

    source = read_build_input(model_dir)
    with RichReporter(Console(stderr=True)) as reporter:
        reporter.stage("observe activations")
        ranges = observe(source, choose_videos(videos, [model_dir]), reporter)
    try:
        output.mkdir(parents=True, exist_ok=True)
        path = ranges.write(output)
    except OSError as error:
        raise BuildError(f"{output} cannot be written: {error.strerror or error}.") from error
    for name in PART_NAMES:
        part = ranges.part(name)
        value, place = part.largest
        click.echo(
            f"{name}: largest magnitude {value:,.1f} at {place} (fp16 holds {FLOAT16_MAX:,.0f}); "
            f"safe in {part.compute_type}."
        )
    click.echo(f"Wrote {path}.")
