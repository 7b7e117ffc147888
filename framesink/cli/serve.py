"""`framesink serve`: live sessions over gRPC."""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click
from pydantic import ValidationError

from framesink.runtime.errors import OptionError
from framesink.runtime.load.ladder import ADMISSIONS, DEFAULT_LADDER
from framesink.serving.options import ServeOptions

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PORT = click.IntRange(1, 65535)
_COUNT = click.IntRange(min=1)
_SECONDS = click.FloatRange(min=0, min_open=True)
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True)
_WATCH_SECONDS = 0.2
# In its place stands a directory that is made when the server starts.
_PRIVATE_DIRECTORY = "PRIVATE_DIRECTORY"
_LEVELS = ["debug", "info", "warning", "error"]


def _limit(name: str, help_text: str) -> Callable[[_Function], _Function]:
    """An option for a field of ServeOptions, with its default."""
    default = ServeOptions.model_fields[name].default
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, float):
        return click.option(flag, type=_SECONDS, default=default, show_default=True, help=help_text)
    return click.option(flag, type=_COUNT, default=default, show_default=True, help=help_text)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--address",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen; 0.0.0.0 is every interface of this machine.",
)
@click.option("--grpc-port", type=_PORT, default=8001, show_default=True, help="Sessions.")
@click.option(
    "--http-port", type=_PORT, default=8000, show_default=True, help="Health and metadata."
)
@click.option(
    "--metrics-port", type=_PORT, default=8002, show_default=True, help="Prometheus, at /metrics."
)
@click.option("--tls-certificate", type=_FILE, help="PEM certificate of the server, for gRPC.")
@click.option("--tls-key", type=_FILE, help="Its PEM key.")
@click.option(
    "--tls-client-authority", type=_FILE, help="Clients need a certificate of this authority (PEM)."
)
@click.option("--executor", default="auto", show_default=True, help="Which executor runs it.")
@click.option("--threads", type=_COUNT, help="CPU threads; by default one per physical core.")
@click.option("--max-sessions", type=_COUNT, help="Sessions at once; by default the bundle's.")
@click.option("--num-pages", type=_COUNT, help="Pages of the K/V cache; by default for all.")
@click.option(
    "--ensemble/--no-ensemble",
    default=True,
    show_default=True,
    help="Serve streaming_vlm and the models it is made of, beside language_model.",
)
@click.option(
    "--admission",
    type=click.Choice(ADMISSIONS),
    default="check",
    show_default=True,
    help="Refuse a session that there is no time for beside the live ones, or none.",
)
@click.option(
    "--wait-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="A session that finds no room waits so long for it, after those who came before.",
)
@click.option(
    "--ladder",
    default=DEFAULT_LADDER,
    show_default=True,
    help="What is halved, rung by rung, when replies are late; none: nothing.",
)
@_limit("idle_seconds", "A session without a request for so long is closed.")
@_limit("resume_seconds", "A session whose client is gone waits so long for it to come back.")
@_limit("drain_seconds", "Longest wait for what is being answered, when told to stop.")
@_limit("start_seconds", "Longest wait for the models to load.")
@_limit("max_pending_chunks", "Chunks of a session that may wait.")
@_limit("max_pending_questions", "Questions of a session that may wait.")
@_limit("max_frames", "Frames of a chunk.")
@_limit("max_frame_bytes", "Size of a compressed frame.")
@_limit("max_frame_pixels", "Area of a frame.")
@_limit("max_chunk_pixels", "Area of all frames of a chunk.")
@_limit("max_query_characters", "Length of a query.")
@_limit("max_question_characters", "Length of a question.")
@_limit("max_previous_text_characters", "Length of the text a resumed session brings.")
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS),
    default="warning",
    show_default=True,
    help="Least important log lines (JSON, on stderr).",
)
@click.option("--print-config", is_flag=True, help="Print the configuration and start nothing.")
def serve(bundle: Path, print_config: bool, **options: Any) -> None:
    """Serve live sessions of the engine bundle BUNDLE with Triton Inference Server.

    Prints what it serves once it is ready. On SIGTERM or Ctrl-C it takes no new sessions, answers
    what waits, and ends; the second time, it ends at once.
    """
    try:
        checked = ServeOptions(**options)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise OptionError(f"{message[:1].upper()}{message[1:]}.") from error
    if print_config:
        _print_config(bundle, checked)
    else:
        _serve(bundle, checked)


def _serve(bundle: Path, options: ServeOptions) -> None:
    # Imported here: --help and --print-config need no server.
    from framesink.cli.serve_summary import describe_server
    from framesink.serving.log_format import configure_logging
    from framesink.serving.supervisor import Supervisor

    configure_logging(sys.stderr, options.log_level)
    told_to_stop = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if told_to_stop.is_set():
            raise KeyboardInterrupt
        told_to_stop.set()

    with Supervisor(bundle, options) as supervisor:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        click.echo(describe_server(supervisor))
        while not told_to_stop.is_set() and not supervisor.wait(_WATCH_SECONDS):
            pass
        if told_to_stop.is_set():
            supervisor.drain()
    supervisor.raise_failure()


def _print_config(bundle: Path, options: ServeOptions) -> None:
    from framesink.runtime.bundle import Bundle
    from framesink.serving.launcher import model_context, needs_gpu
    from framesink.serving.layout import Layout
    from framesink.serving.model_config import config_text, model_configs

    opened = Bundle.open(bundle, check="sizes")
    context = model_context(opened, options, Layout(Path(_PRIVATE_DIRECTORY)))
    configs = model_configs(opened.manifest, context, gpu=needs_gpu(opened, options))
    for name, config in configs.items():
        click.echo(f"# {name}/config.pbtxt\n{config_text(config)}")
