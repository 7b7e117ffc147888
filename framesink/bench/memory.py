"""What the process holds, on the host and on the GPU."""

import sys
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes that torch's tensors take up (`allocated`), that torch has taken from the driver
    (`reserved`), and that are taken in all (`used`), by kernels and graphs too. How often torch
    asked the driver for memory since the start is `device_allocations`."""

    allocated: int
    reserved: int
    used: int
    device_allocations: int


@dataclass(frozen=True, slots=True)
class Memory:
    """`resident` bytes of physical memory, and the GPU's if torch uses one."""

    resident: int
    gpu: GpuMemory | None

    @classmethod
    def now(cls) -> "Memory":
        """Of this process, at this moment."""
        return cls(int(psutil.Process().memory_info().rss), _gpu_memory())

    def growth_since(self, before: "Memory") -> "Memory":
        """How much more there is."""
        gpu = None
        if self.gpu is not None and before.gpu is not None:
            gpu = GpuMemory(
                self.gpu.allocated - before.gpu.allocated,
                self.gpu.reserved - before.gpu.reserved,
                self.gpu.used - before.gpu.used,
                self.gpu.device_allocations - before.gpu.device_allocations,
            )
        return Memory(self.resident - before.resident, gpu)


def _gpu_memory() -> GpuMemory | None:
    # Whoever runs a model with torch has imported it.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(
        allocated=stats["allocated_bytes.all.current"],
        reserved=stats["reserved_bytes.all.current"],
        used=total - free,
        device_allocations=stats["num_device_alloc"],
    )
