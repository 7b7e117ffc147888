"""What this GPU can do: bytes read a second, operations a second.

Times are those of replayed CUDA graphs, so that launching from the host is not in them.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median

import torch
from torch import Tensor

from framesink.bench.floors import GpuRates
from framesink.bench.precisions import Precision
from framesink.runtime.executors.cuda.kernels.linear import Weights, linear

ACTIVATIONS = torch.bfloat16
DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_READ_BYTES = 4 << 30
_LARGE = 8192
_REPEATS = 9


def measure_rates(precisions: Iterable[Precision]) -> GpuRates:
    """The rates of the first GPU, in `precisions` and in bf16."""
    wanted = sorted({"bf16", *precisions})
    return GpuRates(_read_bandwidth(), {precision: _peak(precision) for precision in wanted})


def product(weights: Weights, inputs: Tensor, out: Tensor) -> Callable[[], object]:
    """A linear layer as the executor runs it."""
    return lambda: linear(inputs, weights, out)


def random_weights(channels: int, depth: int, precision: Precision) -> Weights:
    """A linear layer of random values or codes."""
    weight = random_values(channels, depth, precision)
    if precision == "bf16":
        return Weights(weight)
    return Weights(weight, torch.full((channels,), 1e-4, device="cuda"))


def random_values(rows: int, columns: int, precision: Precision) -> Tensor:
    """Random values or codes; zeros would run faster than real data does."""
    if precision == "int8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device="cuda")
    values = torch.empty((rows, columns), dtype=ACTIVATIONS, device="cuda")
    return values.normal_().to(DTYPES[precision])


def time_calls(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call: the median over replays of a graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times)


def _read_bandwidth() -> float:
    """Bytes a second of the faster of two that read much more than a cache holds: a sum, and a
    matrix-vector product."""
    values = torch.empty((_READ_BYTES // 2 // _LARGE, _LARGE), dtype=ACTIVATIONS, device="cuda")
    values.normal_()
    vector = random_values(1, _LARGE, "bf16")[0]
    wide = values.view(torch.float32)
    calls: list[Callable[[], object]] = [lambda: wide.sum(), lambda: torch.mv(values, vector)]
    return _READ_BYTES / min(time_calls([call]) for call in calls)


def _peak(precision: Precision) -> float:
    """Operations a second of a large square product, by the faster of our kernel and torch's."""
    inputs = random_values(_LARGE, _LARGE, precision)
    weights = random_weights(_LARGE, _LARGE, precision)
    out = torch.empty((_LARGE, _LARGE), dtype=ACTIVATIONS, device="cuda")
    one = torch.ones((), device="cuda")
    calls = [product(weights, inputs, out)]
    if precision == "fp8":
        calls.append(
            lambda: torch._scaled_mm(
                inputs, weights.weight.t(), one, one, out_dtype=ACTIVATIONS, use_fast_accum=True
            )
        )
    elif precision == "int8":
        calls.append(lambda: torch._int_mm(inputs, weights.weight.t()))
    return 2.0 * _LARGE**3 / min(time_calls([call]) for call in calls)
