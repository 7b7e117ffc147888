"""The file a plan is written to: what comes out is what went in, on every file system."""

import os
from pathlib import Path

import pytest

from framesink.build.plans import plan_file
from framesink.build.plans.plan_file import PlanFile

SIZES = ([], [0], [1], [4096], [5000, 1, 12_288], [3 * 4096], [4095, 4097, 40_000, 7])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_bytes_arrive_in_order(
    sizes: list[int], direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_file, "_BLOCK", 8192)
    if not direct:
        monkeypatch.setattr(plan_file, "_DIRECT", 0)
    pieces = [os.urandom(size) for size in sizes]
    path = tmp_path / "file"
    path.write_bytes(b"what was there before, and is longer than some of the new contents")
    with PlanFile(path) as file:
        assert [file.write(piece) for piece in pieces] == sizes
    assert path.read_bytes() == b"".join(pieces)


def test_a_file_system_without_direct_writing_is_written_to_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse_direct(path: Path, flags: int, mode: int) -> int:
        if flags & plan_file._DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(plan_file, "_BLOCK", 8192)
    monkeypatch.setattr(plan_file.os, "open", refuse_direct)
    with PlanFile(tmp_path / "file") as file:
        file.write(bytes(10_000))
    assert (tmp_path / "file").read_bytes() == bytes(10_000)


def test_a_full_disk_is_an_error_and_not_a_short_file() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left"), PlanFile(Path("/dev/full")) as file:
        file.write(bytes(10))
