"""What the GPU draws and how fast its clock is while a measurement runs, by NVIDIA's NVML.

A data-center GPU that is full for seconds reaches its power limit and lowers its clock: what it can
hold is less than what short runs promise.
"""

import sys
import threading
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

# Seconds between two looks at the clock.
_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class GpuPower:
    """Means over a measurement: `watts` drawn, of the `limit` that is enforced, and the clock of
    the multiprocessors in hertz, of its `highest`. `capped` is the share of the time in which the
    driver held the clock down for the limit's sake."""

    watts: float
    limit: float
    clock: float
    highest: float
    capped: float


@dataclass(frozen=True, slots=True)
class _Look:
    """What NVML says at a moment; the clock in megahertz."""

    watts: float
    clock: int
    capped: bool


class PowerMeter:
    """Measures from `start` to `stop`."""

    def __init__(self, nvml: Any, device: Any) -> None:
        """`nvml` is the module `pynvml`, initialised, and `device` its handle of a GPU."""
        self._nvml = nvml
        self._device = device
        self._looks: list[_Look] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power-meter", daemon=True)

    @classmethod
    def of_first_gpu(cls) -> Self | None:
        """Of the first GPU that torch uses; None where it uses none, or NVML does not tell (the
        package nvidia-ml-py comes with the extra `cuda`)."""
        # Whoever runs a model with torch has imported it.
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return None
        try:
            import pynvml
        except ModuleNotFoundError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(0).uuid
            meter = cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
            meter._look()
        except pynvml.NVMLError:
            return None
        return meter

    def start(self) -> None:
        """Begin to measure."""
        self._looks.append(self._look())
        self._thread.start()

    def stop(self) -> GpuPower:
        """What was measured since `start`."""
        self._ended.set()
        self._thread.join()
        nvml, device = self._nvml, self._device
        return GpuPower(
            watts=fmean(look.watts for look in self._looks),
            limit=nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3,
            clock=fmean(look.clock for look in self._looks) * 1e6,
            highest=nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM) * 1e6,
            capped=fmean(look.capped for look in self._looks),
        )

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE):
            self._looks.append(self._look())

    def _look(self) -> _Look:
        nvml, device = self._nvml, self._device
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(device)
        return _Look(
            watts=nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
            clock=nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
            capped=bool(reasons & nvml.nvmlClocksEventReasonSwPowerCap),
        )
