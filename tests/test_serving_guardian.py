"""The process between supervisor and server, with a shell in the server's place."""

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake.waiting import until

from framesink.serving.guardian import SHARED_MEMORY, SIGNALLED, guarded_command

# A child that its parent does not wait for, in the background; then it tells that it runs.
FAMILY = ["/bin/sh", "-c", "sleep 300 & echo started; sleep 300"]
# A supervisor that starts its command and waits.
SUPERVISOR = """
import subprocess, sys
from pathlib import Path
from framesink.serving.guardian import guarded_command
directory, prefix, *command = sys.argv[1:]
command = guarded_command(command, Path(directory), prefix)
subprocess.Popen(command, start_new_session=True).wait()
"""


@pytest.fixture
def region() -> Iterator[Path]:
    """A file of shared memory, and the prefix of its name."""
    path = SHARED_MEMORY / f"framesink-test-{uuid.uuid4().hex}-region"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def prefix_of(region: Path) -> str:
    return region.name.removesuffix("region")


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 3", 3), ("kill -SEGV $$", SIGNALLED + signal.SIGSEGV)],
)
def test_it_ends_as_its_command(tmp_path: Path, region: Path, script: str, status: int) -> None:
    command = guarded_command(["/bin/sh", "-c", script], tmp_path, prefix_of(region))
    assert subprocess.run(command, check=False, timeout=60).returncode == status
    assert not region.exists()
    assert tmp_path.exists()


def test_told_to_end_it_leaves_nothing(tmp_path: Path, region: Path) -> None:
    command = guarded_command(FAMILY, tmp_path, prefix_of(region))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guardian:
        assert guardian.stdout is not None
        assert guardian.stdout.readline() == "started\n"
        family = psutil.Process(guardian.pid).children(recursive=True)
        assert len(family) >= 2
        guardian.terminate()
        guardian.wait(60)
    assert not any(member.is_running() for member in family)
    assert not region.exists()
    assert tmp_path.exists()


def test_it_does_not_outlive_its_parent(tmp_path: Path, region: Path) -> None:
    directory = tmp_path / "private"
    directory.mkdir()
    command = [sys.executable, "-c", SUPERVISOR, str(directory), prefix_of(region), *FAMILY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 3
        parent.kill()
        parent.wait(60)
        until(lambda: not directory.exists())
    assert not region.exists()
    until(lambda: not any(_runs(member) for member in family))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
