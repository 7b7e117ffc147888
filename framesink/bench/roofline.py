"""The roofline of this GPU: memory bandwidth, matrix rates, and the floors that follow from them.

A step takes at least as long as moving its bytes once, and as its operations at the rate of a large
product (Williams et al., 2009). Times are those of replayed CUDA graphs, so that launching from the
host is not in them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from framesink.bench.roofline_report import ProductTime, RooflineReport, StepFloor
from framesink.runtime.errors import OptionError
from framesink.runtime.executors.cuda.kernels.linear import Weights, linear
from framesink.runtime.models.config import TextConfig

_ACTIVATIONS = torch.bfloat16
_WEIGHTS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_COPIED = 4 << 30
_LARGE = 8192
_REPEATS = 9
# Weights are read in turn, so many that none is still in the cache.
_CACHES = 4


@dataclass(frozen=True, slots=True)
class _Product:
    """A linear layer that a step runs `count` times; the last one, over the vocabulary, only for
    rows whose logits are wanted."""

    name: str
    channels: int
    depth: int
    count: int
    for_logits: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    kind: str
    sequences: int
    rows: int

    def rows_of(self, product: _Product) -> int:
        """How many rows a product has in this step."""
        return self.sequences if product.for_logits else self.rows


def measure_roofline(
    workload: str,
    config: TextConfig,
    precision: str,
    *,
    context: int,
    prompt: int,
    sequences: Sequence[int],
) -> RooflineReport:
    """Measure at the sizes of a language model whose linear layers are in `precision` (bf16, fp8,
    int8).

    Decode steps are of `sequences` sequences with `context` tokens each, the prefill is of `prompt`
    tokens after as many. K/V are taken to be in 16 bits. Raises OptionError on a machine without a
    GPU.
    """
    if not torch.cuda.is_available():
        raise OptionError("The roofline is that of a GPU, and torch sees none here.")
    weight_type = _WEIGHTS[precision]
    bandwidth, peak, peak_16bit = _copy_bandwidth(), _peak(weight_type), _peak(_ACTIVATIONS)
    products = _products(config)
    steps = [*(_Step("decode", count, count) for count in sequences), _Step("prefill", 1, prompt)]
    times: dict[tuple[str, int], ProductTime] = {}
    for product in products:
        for rows in sorted({step.rows_of(product) for step in steps}):
            size = product.channels * product.depth
            times[product.name, rows] = ProductTime(
                product.name,
                product.channels,
                product.depth,
                rows,
                seconds=_time_product(product, rows, weight_type),
                floor=max(size * weight_type.itemsize / bandwidth, 2 * rows * size / peak),
            )

    def floor_of(step: _Step) -> StepFloor:
        parts = [
            (product.count, times[product.name, step.rows_of(product)]) for product in products
        ]
        return StepFloor(
            step.kind,
            step.sequences,
            step.rows,
            linear=sum(count * part.floor for count, part in parts),
            attention=max(
                _context_bytes(config, step, context) / bandwidth,
                _attention_operations(config, step, context) / peak_16bit,
            ),
            measured=sum(count * part.seconds for count, part in parts),
        )

    return RooflineReport(
        workload,
        precision,
        context,
        bandwidth,
        peak,
        peak_16bit,
        tuple(times.values()),
        tuple(floor_of(step) for step in steps),
    )


def _products(config: TextConfig) -> list[_Product]:
    """The linear layers of the language model, those that share an input as one."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        _Product("q, k, v", (heads + 2 * key_heads) * config.head_dim, hidden, layers),
        _Product("attention output", hidden, heads * config.head_dim, layers),
        _Product("gate, up", 2 * inner, hidden, layers),
        _Product("down", hidden, inner, layers),
        _Product("vocabulary", config.vocab_size, hidden, 1, for_logits=True),
    ]


def _context_bytes(config: TextConfig, step: _Step, context: int) -> float:
    row: int = 2 * config.num_key_value_heads * config.head_dim * _ACTIVATIONS.itemsize
    return config.num_hidden_layers * step.sequences * context * row


def _attention_operations(config: TextConfig, step: _Step, context: int) -> float:
    """Two products of the head's size for every pair of a row and what it sees."""
    seen = context + step.rows / step.sequences / 2
    width = config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * 4 * step.rows * seen * width


def _copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy much larger than the cache."""
    source = torch.empty(_COPIED // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * _COPIED / _time([lambda: target.copy_(source)])


def _peak(weight_type: torch.dtype) -> float:
    """Operations a second of a large square product."""
    product = _Product("large", _LARGE, _LARGE, 1)
    return 2.0 * _LARGE * _LARGE * _LARGE / _time_product(product, _LARGE, weight_type)


def _time_product(product: _Product, rows: int, weight_type: torch.dtype) -> float:
    size = product.channels * product.depth * weight_type.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, -(-_CACHES * cache // size))
    inputs = _random(rows, product.depth, weight_type)
    out = torch.empty((rows, product.channels), dtype=_ACTIVATIONS, device="cuda")
    layers = [
        _weights(_random(product.channels, product.depth, weight_type)) for _ in range(copies)
    ]

    def call(weights: Weights) -> Callable[[], object]:
        return lambda: linear(inputs, weights, out)

    return _time([call(weights) for weights in layers])


def _weights(weight: Tensor) -> Weights:
    if weight.dtype is _ACTIVATIONS:
        return Weights(weight)
    return Weights(weight, torch.full((len(weight),), 1e-4, device="cuda"))


def _random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random values or codes; zeros would run faster than real data does."""
    if dtype is torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=dtype, device="cuda")
    values = torch.empty((rows, columns), dtype=_ACTIVATIONS, device="cuda")
    return values.normal_().to(dtype)


def _time(calls: Sequence[Callable[[], object]]) -> float:
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
