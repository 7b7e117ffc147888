"""Write a Qwen2.5-VL checkpoint of a published size with random weights, for timing.

python scripts/random_checkpoint.py 3b /tmp/random-3b
build-engines /tmp/random-3b -o /tmp/random-3b-engines
"""

from pathlib import Path

import click

from framesink.build.random_checkpoint import SIZES, write_random_checkpoint


@click.command()
@click.argument("size", type=click.Choice(list(SIZES)))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True)
def main(size: str, directory: Path, seed: int) -> None:
    """Write a checkpoint of SIZE into DIRECTORY."""
    write_random_checkpoint(size, directory, seed=seed)


if __name__ == "__main__":
    main()
