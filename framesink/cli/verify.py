"""`framesink verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from framesink.build.gate import QualityGate, Verification
    from framesink.calibration.agreement import Agreement
    from framesink.runtime.bundle import Bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The 16-bit checkpoint BUNDLE was built from, to compare with.",
)
@click.option(
    "--executor",
    help="An executor to compare with onnxruntime on this machine: tensorrt, cuda or auto.",
)
@click.option(
    "--chunks",
    type=click.IntRange(min=1),
    help="How many chunks --executor is compared over.  [default: 32, and 4 for a large model]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="How many tokens a 16-bit bundle is compared with transformers over.",
)
@click.option(
    "--gate",
    metavar="top1=X,kl=Y",
    help="Least top-1 agreement and largest mean KL divergence over streamed chunks.  "
    "[default: top1=0.98,kl=0.02 for a quantized bundle and for --executor]",
)
@click.option(
    "--video",
    "videos",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Video to stream, or folder of videos; may be given again.  [default: what a build would "
    "hold back of the checkpoint's own video, or of a generated scene]",
)
def verify(
    bundle: Path,
    checkpoint: Path | None,
    executor: str | None,
    chunks: int | None,
    tokens: int,
    gate: str | None,
    videos: tuple[Path, ...],
) -> None:
    """Check the engine bundle BUNDLE.

    Every file must have the size and hash of the manifest. With --checkpoint a 16-bit bundle's
    graphs and the checkpoint in transformers get the same frames and tokens, and their results must
    agree. A quantized bundle, or any with --gate, is compared over streamed chunks, and must reach
    the gate; without --checkpoint --gate judges what was measured when the bundle was built.

    With --executor that executor and onnxruntime run the bundle on this machine, over the same
    frames and tokens, and it must reach the gate. With K/V in one byte both are compared with
    onnxruntime over K/V that is not quantized, and the gate is what it may lose beyond onnxruntime.
    """
    from rich.console import Console

    from framesink.build.gate import DEFAULT_GATE, QualityGate
    from framesink.runtime.bundle import Bundle
    from framesink.runtime.errors import OptionError

    if executor is not None and checkpoint is not None:
        raise OptionError(
            "--executor compares with onnxruntime and --checkpoint with transformers; ask for one."
        )
    if executor is None and chunks is not None:
        raise OptionError("--chunks goes with --executor; leave it out.")
    asked = None if gate is None else QualityGate.parse(gate)
    console = Console()
    opened = Bundle.open(bundle, check="hashes")
    console.print(
        f"{len(opened.manifest.files)} files agree with the manifest in size and SHA-256.",
        highlight=False,
    )
    if executor is not None:
        _compare_executor(opened, executor, asked or DEFAULT_GATE, videos, chunks, console)
    elif checkpoint is not None and (asked is not None or opened.manifest.is_quantized):
        _judge(_measure(opened, checkpoint, videos, console), asked or DEFAULT_GATE, console)
    elif checkpoint is not None:
        _compare_with_transformers(opened, checkpoint, tokens, console)
    elif asked is not None:
        _judge(_stored(opened), asked, console)
    else:
        console.print(
            "The graphs were not run against anything: pass --checkpoint to compare them with the "
            "model they were built from.",
            highlight=False,
        )


def _stored(bundle: "Bundle") -> "Verification":
    from framesink.build.gate import read_verification
    from framesink.runtime.errors import VerificationError

    stored = read_verification(bundle)
    if stored is None:
        raise VerificationError(
            f"Nothing was measured when {bundle.directory} was built; pass --checkpoint to measure "
            "it now."
        )
    return stored


def _measure(
    bundle: "Bundle", checkpoint: Path, videos: tuple[Path, ...], console: "Console"
) -> "Verification":
    from framesink.build.footage import Footage, choose_videos, divide_footage
    from framesink.build.quality import judged_chunks, measure_quality
    from framesink.calibration.videos import DEFAULT_CHUNKS

    manifest = bundle.manifest
    chosen, judge = choose_videos(videos, [checkpoint]), judged_chunks(manifest.model)
    seconds = manifest.streaming.chunk_seconds
    footage = (
        Footage.whole(chosen, judge)
        if videos
        else divide_footage(
            chosen, manifest.preprocess, seconds, calibrate=DEFAULT_CHUNKS, judge=judge
        )
    )
    with console.status("Streaming") as status:
        return measure_quality(
            bundle,
            checkpoint,
            footage,
            on_progress=lambda share: status.update(f"Streaming, {share:.0%}"),
        )


def _judge(measured: "Verification", gate: "QualityGate", console: "Console") -> None:
    """Print what was measured against what was asked.

    Raises VerificationError where that is not reached.
    """
    from rich.table import Table

    table = Table(f"against {measured.reference} in float32", "found", "asked")
    _add_agreement(table, gate, measured)
    table.add_row("tokens compared", f"{measured.tokens} in {measured.chunks} chunks", "")
    table.add_row("video", measured.source, "")
    console.print(table)
    measured.check(gate, video_option="--video")


def _add_agreement(
    table: "Table", gate: "QualityGate", *columns: "Verification | Agreement"
) -> None:
    least = f"≥ {gate.top1:.2%}" if gate.top1 > 0.0 else ""
    table.add_row("top-1 agreement", *(f"{found.top1:.2%}" for found in columns), least)
    most = f"≤ {gate.kl:.4g}" if gate.kl < float("inf") else ""
    table.add_row("mean KL divergence, nats", *(f"{found.kl:.4g}" for found in columns), most)
    table.add_row("largest KL divergence, nats", *(f"{found.worst_kl:.4g}" for found in columns))


def _compare_executor(
    bundle: "Bundle",
    executor: str,
    gate: "QualityGate",
    videos: tuple[Path, ...],
    chunks: int | None,
    console: "Console",
) -> None:
    """Print how far the executor is from ONNX Runtime.

    Raises VerificationError where the gate is not reached.
    """
    from rich.table import Table

    from framesink.build.footage import Footage, choose_videos
    from framesink.build.quality import judged_chunks
    from framesink.build.verify_executor import REFERENCE, verify_executor

    footage = Footage.whole(
        choose_videos(videos, ()), chunks or judged_chunks(bundle.manifest.model)
    )
    with console.status("Starting") as status:
        report = verify_executor(
            bundle,
            executor,
            footage,
            on_progress=lambda share: status.update(f"Streaming, {share:.0%}"),
        )
    console.print(report.reason, style="dim", highlight=False)
    columns = [report.agreement]
    headings = [f"{report.executor} against {report.reference}", "found", "asked"]
    if report.same_codes is not None:
        console.print(
            f"Every executor rounds K/V in {bundle.manifest.cache_precision} in a way of its own, "
            f"so {report.executor} and {REFERENCE} are both compared with {report.reference}; "
            f"{report.executor} may lose as much more than {REFERENCE} as the gate {gate} allows.",
            highlight=False,
        )
        columns.append(report.same_codes)
        headings = [
            f"against {report.reference}",
            report.executor,
            REFERENCE,
            f"asked of {report.executor}",
        ]
    table = Table(*headings)
    _add_agreement(table, report.asked(gate), *columns)
    differing = (f"{found.differing_tokens} of {found.tokens}" for found in columns)
    table.add_row("greedy tokens that differ", *differing)
    table.add_row("sessions in a step", f"{report.copies}")
    table.add_row("video", f"{report.chunks} chunks of {report.source}")
    console.print(table)
    report.check(gate)


def _compare_with_transformers(
    bundle: "Bundle", checkpoint: Path, tokens: int, console: "Console"
) -> None:
    from rich.table import Table

    from framesink.build.verify import MAX_LOGIT_ERROR, MAX_VISION_ERROR, verify_bundle

    with console.status("Starting") as status:
        report = verify_bundle(
            bundle,
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
