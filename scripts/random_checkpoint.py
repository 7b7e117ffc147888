"""Write a Qwen2.5-VL checkpoint of a published size with random weights, for timing.

python scripts/random_checkpoint.py 7b /tmp/random-7b --precision fp8
build-engines /tmp/random-7b -o /tmp/random-7b-engines --target sm89 --no-gate
"""

from pathlib import Path

import click

from framesink.build.random_checkpoint import SIZES, write_random_checkpoint
from framesink.runtime.models.quantization import LinearScheme

PRECISIONS = {
    "16bit": LinearScheme.UNQUANTIZED,
    "fp8": LinearScheme.FP8,
    "int8": LinearScheme.INT8,
    "int8-weight-only": LinearScheme.INT8_WEIGHT_ONLY,
}


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="16bit")
@click.option("--seed", type=int, default=0, show_default=True)
def main(size: str, directory: Path, precision: str, seed: int) -> None:
    """Write a checkpoint of SIZE into DIRECTORY."""
    write_random_checkpoint(size, directory, scheme=PRECISIONS[precision], seed=seed)


if __name__ == "__main__":
    main()
