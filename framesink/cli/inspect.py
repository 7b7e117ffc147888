"""`framesink inspect`."""

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what the engine bundle BUNDLE holds.

    Checks that every file is there and of the right size; `framesink verify` checks contents.
    """
    from rich.console import Console

    from framesink.cli.summary import print_bundle
    from framesink.runtime.bundle import Bundle

    opened = Bundle.open(bundle, check="sizes")
    if as_json:
        click.echo(opened.manifest.model_dump_json(indent=2))
    else:
        print_bundle(opened, Console())
