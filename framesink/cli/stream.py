"""`framesink stream`: live captions of a file, a webcam or a URL."""

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from framesink.runtime.captions.jsonl import JsonlWriter
from framesink.runtime.captions.webvtt import WebVttWriter
from framesink.runtime.captions.writer import CaptionWriter
from framesink.runtime.engine import StreamingEngine, default_sampling
from framesink.runtime.errors import OptionError
from framesink.runtime.executors.tensorrt_llm.options import TRIM_TURNS, TensorRTLLMOptions
from framesink.runtime.garbage import pass_over_what_is_loaded
from framesink.runtime.load.ladder import DEFAULT_LADDER, Ladder, RealTime
from framesink.runtime.manifest import StreamingDefaults
from framesink.runtime.policies import FullAttention, Policy, SlidingWindow
from framesink.runtime.sampler import SamplingParams
from framesink.runtime.session_plan import default_policy
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.dropping import DROP_POLICIES
from framesink.runtime.video.source import open_source
from framesink.runtime.video.sources import LARGEST_FRAME_PIXELS
from framesink.terminal.keyboard import Keyboard, can_type
from framesink.terminal.live import LiveView
from framesink.terminal.narration import Narration, TimedQuestion
from framesink.terminal.preview import PreviewWindow
from framesink.terminal.view import PlainView, View

_SINK_OPTIONS = ("sink_text", "recent_text", "vision_seconds", "reply_turns")
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_POSITIVE = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("source")
@click.option(
    "--engines",
    required=True,
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    help="The engine bundle that build-engines made.",
)
@click.option("--query", help="A standing instruction; it stays in the context for ever.")
@click.option(
    "--ask",
    "asks",
    multiple=True,
    metavar="SECONDS:TEXT",
    help="A question to ask at this second of the video; may be given several times.",
)
@click.option(
    "--policy",
    type=click.Choice(["sink", "sliding", "full"]),
    default="sink",
    show_default=True,
    help="What stays in the context: sink and windows, whole recent turns, or everything.",
)
@click.option("--sink-text", type=click.IntRange(min=0), help="sink: first tokens of text kept.")
@click.option("--recent-text", type=click.IntRange(min=0), help="sink: last tokens of text kept.")
@click.option("--vision-seconds", type=_POSITIVE, help="sink and sliding: seconds of video kept.")
@click.option("--reply-turns", type=_COUNT, help="sink: replies kept in place.")
@click.option("--max-new-tokens", type=_COUNT, help="Longest reply to one chunk.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(min=0), help="Sample among so many tokens; 0 is off.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="1 is off.")
@click.option("--repetition-penalty", type=_POSITIVE, help="1 is off.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option(
    "--vtt", type=click.Path(path_type=Path), help="Write captions as WebVTT, for players."
)
@click.option("--jsonl", type=click.Path(path_type=Path), help="Write every reply as a JSON line.")
@click.option(
    "--realtime/--fast",
    default=False,
    show_default=True,
    help="Play a file at its own pace, or as fast as inference goes. Live sources are realtime.",
)
@click.option(
    "--drop-policy",
    type=click.Choice(DROP_POLICIES),
    default="latest",
    show_default=True,
    help="When inference is late: keep the newest chunk, frames spread evenly over all that "
    "waits, or the frames that differ most.",
)
@click.option(
    "--ladder",
    default=DEFAULT_LADDER,
    show_default=True,
    help="Live sources: what is halved, rung by rung, when replies are late; none: nothing.",
)
@click.option("--fps", type=_POSITIVE, help="Frames per second the model sees.")
@click.option("--max-chunks", type=_COUNT, help="Stop after so many chunks.")
@click.option("--max-frame-pixels", type=_COUNT, default=LARGEST_FRAME_PIXELS, show_default=True)
@click.option(
    "--timeout",
    type=_POSITIVE,
    default=5.0,
    show_default=True,
    help="Longest wait for a URL to open or to deliver, in seconds.",
)
@click.option("--executor", default="auto", show_default=True, help="Which executor runs it.")
@click.option("--threads", type=_COUNT, help="CPU threads; by default one per physical core.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="tensorrt_llm: the checkpoint it reads.  [default: the one the bundle carries]",
)
@click.option(
    "--trim-turns",
    type=_COUNT,
    help="tensorrt_llm: trim the context once in so many turns; 1 follows the policy exactly.  "
    f"[default: {TRIM_TURNS}]",
)
@click.option("--preview", is_flag=True, help="Show the frames in a window (needs the gui extra).")
def stream(source: str, engines: Path, asks: tuple[str, ...], **options: Any) -> None:
    """Narrate SOURCE: a video file, a webcam index such as 0, or a URL.

    Captions appear as they are said; on a terminal, type a line to ask a question. Where stdout is
    not a terminal, captions are lines on stdout and everything else goes to stderr.

    The exit code is 0 at the end of the video; 130 after Ctrl-C; 5 if the video cannot be read or
    ended early (what came before is narrated). Whatever ends it, captions said so far are kept.
    """
    questions = [TimedQuestion.parse(ask) for ask in asks]
    ladder = Ladder.parse(options["ladder"])
    with ExitStack() as stack:
        writers: list[CaptionWriter] = []
        for writer_class, path in ((WebVttWriter, options["vtt"]), (JsonlWriter, options["jsonl"])):
            if path is not None:
                writers.append(writer_class(path))
                stack.callback(writers[-1].close)
        preview = PreviewWindow() if options["preview"] else None
        if preview is not None:
            stack.callback(preview.close)
        video = open_source(
            source,
            max_frame_pixels=options["max_frame_pixels"],
            timeout_seconds=options["timeout"],
        )
        stack.callback(video.close)
        engine = stack.enter_context(
            StreamingEngine.load(
                engines,
                options["executor"],
                max_sessions=1,
                threads=options["threads"],
                tensorrt_llm=_tensorrt_llm(options),
            )
        )
        live = video.live or options["realtime"]
        if live:
            engine.measure_costs()
        pass_over_what_is_loaded()
        session = engine.open_session(
            _policy(options, engine.defaults),
            options["query"],
            _sampling(options, engine.defaults),
            max_new_tokens=options["max_new_tokens"],
            max_pending_chunks=1,
            real_time=RealTime(ladder=ladder) if live else None,
        )
        chunks = ChunkStream(
            video,
            options["fps"] or engine.preprocess.fps,
            engine.defaults.chunk_seconds,
            options["drop_policy"],
            options["realtime"],
        )
        for writer in writers:
            writer.start()
        view = _view()
        stack.callback(view.close)
        view.note(f"{video.name} → {engines}")
        view.note(engine.executor_reason)
        if live:
            view.note(engine.capacity().sentence())
        narration = Narration(
            engine,
            session,
            chunks,
            view,
            writers=writers,
            questions=questions,
            max_chunks=options["max_chunks"],
            preview=preview,
        )
        if can_type():
            stack.callback(Keyboard(narration.ask, view.typing).close)
        try:
            narration.run()
        finally:
            view.close()
            view.note(narration.summary.sentence())


def _view() -> View:
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return LiveView(Console(highlight=False))
    return PlainView(sys.stdout, sys.stderr)


def _policy(options: dict[str, Any], defaults: StreamingDefaults) -> Policy:
    given = {name: options[name] for name in _SINK_OPTIONS if options[name] is not None}
    match options["policy"]:
        case "sink":
            return replace(default_policy(defaults), **given)
        case "sliding":
            _refuse(given, "sliding", allowed="vision_seconds")
            return SlidingWindow(given.get("vision_seconds", defaults.vision_seconds))
        case _:
            _refuse(given, "full")
            return FullAttention()


def _tensorrt_llm(options: dict[str, Any]) -> TensorRTLLMOptions | None:
    names = ("checkpoint", "trim_turns")
    given = {name: options[name] for name in names if options[name] is not None}
    return TensorRTLLMOptions(**given) if given else None


def _refuse(given: dict[str, Any], policy: str, allowed: str | None = None) -> None:
    for name in given:
        if name != allowed:
            option = name.replace("_", "-")
            raise OptionError(f"--{option} means nothing to --policy {policy}; leave it out.")


def _sampling(options: dict[str, Any], defaults: StreamingDefaults) -> SamplingParams:
    given = {name: options[name] for name in _SAMPLING_OPTIONS if options[name] is not None}
    return replace(default_sampling(defaults), **given)
