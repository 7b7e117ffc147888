"""Entry points of the command line, and what every command shares.

Commands are imported when they are called: `framesink --help` needs none of their packages.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

from framesink.runtime.errors import FramesinkError

INTERRUPTED = 130

# Name of the command: where it is, and what it does.
COMMANDS = {
    "build": ("framesink.cli.build:build", "Build an engine bundle from a checkpoint."),
    "calibrate": ("framesink.cli.calibrate:calibrate", "Observe and quantize a checkpoint."),
    "inspect": ("framesink.cli.inspect:inspect", "Show what an engine bundle holds."),
    "verify": ("framesink.cli.verify:verify", "Check an engine bundle."),
    "stream": ("framesink.cli.stream:stream", "Caption a live video in the terminal."),
    "serve": ("framesink.cli.serve:serve", "Serve live sessions over gRPC."),
    "bench": ("framesink.cli.bench:bench", "Measure an engine bundle."),
}


@contextmanager
def _sentences(context: click.Context) -> Iterator[None]:
    try:
        yield
    except FramesinkError as error:
        click.echo(f"error: {error}", err=True)
        context.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        context.exit(INTERRUPTED)


class SentenceCommand(click.Command):
    """A command that can also stand alone, with the same errors and exit codes as in a group."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, with FramesinkError as a sentence and Ctrl-C as exit code 130."""
        with _sentences(ctx):
            return super().invoke(ctx)


class LazyGroup(click.Group):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names, in the order a person meets them."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        """Import a command."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """The commands with their short help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, with FramesinkError as a sentence and Ctrl-C as exit code 130."""
        with _sentences(ctx):
            return super().invoke(ctx)


def load_command(name: str) -> click.Command:
    """Import the command `name` of COMMANDS."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    command = getattr(import_module(module), attribute)
    assert isinstance(command, click.Command)
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="framesink")
def framesink() -> None:
    """Live video through a vision-language model: compiled to TensorRT, streamed from a bounded,
    paged KV cache."""


def main() -> NoReturn:
    """The command `framesink`."""
    _die_politely()
    framesink(prog_name="framesink")
    raise AssertionError("click ends the process")


def build_engines() -> NoReturn:
    """The command `build-engines`: the same as `framesink build`."""
    _die_politely()
    load_command("build")(prog_name="build-engines")
    raise AssertionError("click ends the process")


def _die_politely() -> None:
    """Let SIGTERM end a command as Ctrl-C does, so that it cleans up."""

    def interrupt(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
