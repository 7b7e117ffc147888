"""`framesink calibrate`."""

from pathlib import Path

import click


@click.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Directory for activation_ranges.json; MODEL_DIR itself lets build-engines find it.",
)
@click.option(
    "--calibration-video",
    "videos",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Video to observe the model on; may be given again. Default: a generated scene.",
)
def calibrate(model_dir: Path, output: Path, videos: tuple[Path, ...]) -> None:
    """Observe the checkpoint in MODEL_DIR on video and write the range of its activations.

    The model runs in float32, one layer's weights in memory at a time.
    """
    from rich.console import Console

    from framesink.build.source import observe, read_build_input
    from framesink.calibration.ranges import FLOAT16_MAX
    from framesink.cli.progress import RichReporter
    from framesink.cli.summary import PART_NAMES
    from framesink.runtime.errors import BuildError

    source = read_build_input(model_dir)
    with RichReporter(Console(stderr=True)) as reporter:
        reporter.stage("observe activations")
        ranges = observe(source, videos, reporter)
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
