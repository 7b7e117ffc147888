"""Write a directory beside its final place and put it there only when it is whole.

Whoever writes says what kind of directory it is and which error a failure is.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from framesink.runtime.errors import FramesinkError


def check_output(
    output: Path, *, kind: str, marker: str, force: bool, failure: type[FramesinkError]
) -> None:
    """Whether a directory may be written to `output`.

    `kind` is what it is called, `marker` the file that tells an old one. Raises `failure` if it
    exists and `force` is not given, if it exists and is nothing of the kind, and if some parent of
    it is a file.
    """
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise failure(f"{output} cannot be written: {parent} is a file.")
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise failure(f"{output} cannot be written: it exists and is no directory.")
    if any(output.iterdir()) and not (output / marker).is_file():
        raise failure(
            f"{output} holds other files and is no {kind}, so it is not replaced; choose another "
            "place."
        )
    if any(output.iterdir()) and not force:
        raise failure(f"{output} exists; pass --force to replace it.")


@contextmanager
def staged_directory(output: Path, failure: type[FramesinkError]) -> Iterator[Path]:
    """A hidden directory beside `output`, which becomes `output` when the block ends well.

    On any exception the hidden directory and parents made for it are removed, and an old `output`
    stays as it was. Raises `failure` if nothing can be written there.
    """
    output = output.absolute()
    missing = [parent for parent in output.parents if not parent.exists()]
    # Named before it exists, so that an interrupt at any moment finds what to remove.
    staging = output.with_name(f".{output.name}.{uuid4().hex}.partial")
    try:
        _make(staging, failure)
        yield staging
        _replace(output, staging, failure)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(missing)
        raise


def _make(staging: Path, failure: type[FramesinkError]) -> None:
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise failure(f"{staging.parent} cannot be written: {error.strerror or error}.") from error


def _replace(output: Path, staging: Path, failure: type[FramesinkError]) -> None:
    """Put `staging` in the place of `output`; the old one goes only after the new one is there."""
    try:
        if not output.exists():
            staging.rename(output)
            return
        old = staging.with_suffix(".old.partial")
        output.rename(old)
        try:
            staging.rename(output)
        except BaseException:
            old.rename(output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise failure(f"{output} cannot be written: {error.strerror or error}.") from error


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories, innermost first, as far as they are empty."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError:
            return
