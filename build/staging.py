"""A bundle is written beside its final place and put there only when it is whole."""

from contextlib import AbstractContextManager
from pathlib import Path

from framesink.runtime import staging
from framesink.runtime.errors import BuildError
from framesink.runtime.manifest import MANIFEST_NAME


def check_output(output: Path, *, force: bool) -> None:
    """Whether a bundle may be written to `output`.

    Raises BuildError if it exists and `force` is not given, if it exists and is no bundle, and if
    some parent of it is a file.
    """
    staging.check_output(
        output, kind="engine bundle", marker=MANIFEST_NAME, force=force, failure=BuildError
    )


def staged_directory(output: Path) -> AbstractContextManager[Path]:
    """A hidden directory beside `output`, which becomes `output` when the block ends well.

    Raises BuildError if nothing can be written there.
    """
    return staging.staged_directory(output, BuildError)
