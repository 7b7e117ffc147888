"""`framesink verify`."""

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The checkpoint BUNDLE was built from, to compare with in transformers.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True)
def verify(bundle: Path, checkpoint: Path | None, tokens: int) -> None:
    """Check the engine bundle BUNDLE.

    Every file must have the size and hash of the manifest. With --checkpoint the bundle's graphs
    and the checkpoint in transformers get the same frames and tokens, and their results must agree.
    """
    from rich.console import Console
    from rich.table import Table

    from framesink.build.verify import MAX_LOGIT_ERROR, MAX_VISION_ERROR, verify_bundle
    from framesink.runtime.bundle import Bundle

    console = Console()
    opened = Bundle.open(bundle, check="hashes")
    console.print(
        f"{len(opened.manifest.files)} files agree with the manifest in size and SHA-256.",
        highlight=False,
    )
    if checkpoint is None:
        console.print(
            "The graphs were not run against anything: pass --checkpoint to compare them with the "
            "model in transformers.",
            highlight=False,
        )
        return
    with console.status("Starting") as status:
        report = verify_bundle(
            opened,
            checkpoint,
            tokens=tokens,
            on_stage=lambda name: status.update(f"Running {name}"),
        )
    table = Table("against transformers in float32", "found", "allowed")
    table.add_row(
        "logits, relative error", f"{report.relative_logit_error:.2%}", f"{MAX_LOGIT_ERROR:.0%}"
    )
    table.add_row("logits, largest error", f"{report.max_logit_error:.4g}", "")
    table.add_row("logits, mean error", f"{report.mean_logit_error:.4g}", "")
    table.add_row(
        "vision embeddings, relative error",
        f"{report.relative_vision_error:.2%}",
        f"{MAX_VISION_ERROR:.0%}",
    )
    table.add_row("vision embeddings, largest error", f"{report.max_vision_error:.4g}", "")
    table.add_row("top-1 agreement", f"{report.top1_agreement:.1%} of {report.tokens}", "")
    table.add_row("greedy tokens before the first other", f"{report.agreeing_tokens}", "")
    console.print(table)
    report.check()
