"""What a GPU draws while a benchmark holds it, told by a stand-in of NVML."""

import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from framesink.bench import power
from framesink.bench.measure import Quantiles
from framesink.bench.memory import Memory
from framesink.bench.power import GpuPower, PowerMeter
from framesink.bench.report import streams_table
from framesink.bench.streams import StreamsReport, StreamsResult


class Nvml(ModuleType):
    """NVML's answers for one GPU, the next of `looks` (milliwatts, megahertz, reasons) each time;
    the last one again when there are no more."""

    NVML_CLOCK_SM = 1
    nvmlClocksEventReasonSwPowerCap = 4
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, looks: list[tuple[int, int, int]], *, tells: bool = True) -> None:
        super().__init__("pynvml")
        self.looks = looks
        self.tells = tells
        self.all_seen = threading.Event()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def nvmlDeviceGetCurrentClocksEventReasons(self, device: str) -> int:
        return self.looks[0][2]

    def nvmlDeviceGetPowerUsage(self, device: str) -> int:
        if not self.tells:
            raise self.NVMLError
        return self.looks[0][0]

    def nvmlDeviceGetClockInfo(self, device: str, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        megahertz = self.looks[0][1]
        if len(self.looks) > 1:
            self.looks.pop(0)
        else:
            self.all_seen.set()
        return megahertz

    def nvmlDeviceGetMaxClockInfo(self, device: str, clock: int) -> int:
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, device: str) -> int:
        return 700_000


def use(monkeypatch: pytest.MonkeyPatch, nvml: ModuleType | None, *, initialized: bool) -> None:
    properties = SimpleNamespace(uuid="1234")
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized, get_device_properties=lambda index: properties
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_means_are_those_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_PAUSE", 0.001)
    # The first look is whether NVML tells anything; it does not count.
    nvml = Nvml([(99_000, 300, 1), (600_000, 1900, 0), (700_000, 1600, 4)])
    use(monkeypatch, nvml, initialized=True)
    meter = PowerMeter.of_first_gpu()
    assert meter is not None
    meter.start()
    assert nvml.all_seen.wait(10)
    time.sleep(0.02)
    found = meter.stop()
    assert (found.limit, found.highest) == (700.0, 1.98e9)
    # One look of the first kind, several of the second.
    assert 650.0 <= found.watts < 700.0
    assert 1.6e9 < found.clock <= 1.75e9
    assert found.capped == pytest.approx((found.watts - 600) / 100)
    assert found.capped == pytest.approx((1.9e9 - found.clock) / 0.3e9)


def test_nothing_is_told_without_a_gpu_or_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    look = [(1, 1, 0)]
    use(monkeypatch, Nvml(look), initialized=False)
    assert PowerMeter.of_first_gpu() is None
    use(monkeypatch, None, initialized=True)
    assert PowerMeter.of_first_gpu() is None
    use(monkeypatch, Nvml(look, tells=False), initialized=True)
    assert PowerMeter.of_first_gpu() is None


def test_it_is_a_column_of_the_table() -> None:
    times = Quantiles(0.4, 0.6, 100)
    memory = Memory(0, None)
    drawn = GpuPower(watts=688.4, limit=700.0, clock=1.63e9, highest=1.98e9, capped=1.0)
    result = StreamsResult(4, 25.0, 100, times, times, times, 0, 2.0, None, memory, drawn)
    report = StreamsReport("cuda", (56, 56), 1.0, 100, 4, None, True, (result,), memory)
    table = streams_table(report)
    cells = {str(column.header): next(iter(column.cells)) for column in table.columns}
    assert cells["power"] == "688 W"
    assert cells["clock"] == "1.63 GHz"
    assert table.caption == "GPU: at most 700 W and 1.98 GHz"
