"""What a measurement was made on."""

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("framesink", "numpy", "onnxruntime", "torch", "triton")


@dataclass(frozen=True, slots=True)
class Environment:
    """`date` is the day in UTC, `gpu` the first GPU's name if torch sees one."""

    date: str
    machine: str
    gpu: str | None
    versions: dict[str, str]


def environment() -> Environment:
    """This machine, now."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Environment(
        date=datetime.now(UTC).date().isoformat(),
        machine=platform.machine(),
        gpu=_gpu_name() if "torch" in versions else None,
        versions=versions,
    )


def _gpu_name() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    name: str = torch.cuda.get_device_name(0)
    return name
