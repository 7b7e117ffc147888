"""Every command that the README and the docs name is there, with the options they give it."""

import re
from pathlib import Path

import click
import pytest

from framesink.cli.main import framesink

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BUILD = "build-engines"
# In a block a command ends with its line; within a sentence, with the code it is in.
COMMAND = re.compile(rf"^(?:{BUILD}|framesink [a-z]+)(?: |$).*")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def commands(page: Path) -> list[str]:
    """The command lines of a page, comments left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", sentences)]
    lines = [line for block in blocks for line in block.splitlines()]
    found = (COMMAND.match(line.split("#")[0].strip()) for line in lines + spans)
    return [match[0] for match in found if match]


def options(name: str) -> set[str]:
    """The options of `build-engines` or of a command of `framesink`."""
    subcommand = "build" if name == BUILD else name
    command = framesink.get_command(click.Context(framesink), subcommand)
    assert command is not None, f"there is no command {name}"
    return {spelling for option in command.params for spelling in option.opts} | {
        spelling for option in command.params for spelling in option.secondary_opts
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_they_are_given(page: Path) -> None:
    for line in commands(page):
        first, *rest = line.split()
        name = first if first == BUILD else rest[0]
        unknown = set(OPTION.findall(line.removeprefix(first))) - options(name)
        assert not unknown, f"{line}: {sorted(unknown)}"


def test_the_pages_name_every_command() -> None:
    """So the check above has found what it looks for."""
    named = {
        line.split()[0 if line.startswith(BUILD) else 1] for p in PAGES for line in commands(p)
    }
    assert named >= {*framesink.list_commands(click.Context(framesink)), BUILD} - {"build"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
