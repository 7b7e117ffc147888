"""What this machine can still give: memory, within the limits of its control groups, and disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROCESS_CGROUP = Path("/proc/self/cgroup")


def available_memory(root: Path = _CGROUP_ROOT, process_cgroup: Path = _PROCESS_CGROUP) -> int:
    """Bytes this process may still allocate: free memory, or what a cgroup leaves of its limit."""
    free: int = psutil.virtual_memory().available
    return min([free, *_cgroup_headrooms(root, process_cgroup)])


def free_disk(directory: Path) -> int:
    """Free bytes of the file system that holds `directory` or will hold it."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _cgroup_headrooms(root: Path, process_cgroup: Path) -> Iterator[int]:
    """What each enclosing control group leaves (version 2, and version 1's memory controller)."""
    try:
        lines = process_cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may be that of the host; the mounted root is then ours.
        for place in {group, base, *(parent for parent in group.parents if base in parent.parents)}:
            headroom = _headroom(place, limit, used, cache)
            if headroom is not None:
                yield headroom


def _headroom(group: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        allowed = (group / limit).read_text().strip()
        if allowed == "max":
            return None
        in_use = int((group / used).read_text())
        statistics = dict(
            line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):
        return None
    # File pages that nobody uses are dropped as soon as memory is wanted.
    return max(0, int(allowed) - in_use + int(statistics.get(cache, 0)))
