"""The roofline of this GPU at a model's sizes: every linear layer timed, and held against the least
time it can take."""

from collections.abc import Sequence

import torch

from framesink.bench.floors import (
    ChunkShape,
    Product,
    Step,
    chunk_floor,
    decode_step,
    most_streams,
    prefill_step,
    text_products,
    vision_products,
    vision_step,
)
from framesink.bench.precisions import BYTES, Precisions
from framesink.bench.rates import (
    ACTIVATIONS,
    measure_rates,
    product,
    random_values,
    random_weights,
    time_calls,
)
from framesink.bench.roofline_report import ProductTime, RooflineReport, StepFloor
from framesink.runtime.errors import OptionError
from framesink.runtime.models.config import ModelConfig

# Weights are read in turn, so many that none is still in the cache.
_CACHES = 4


def measure_roofline(
    workload: str,
    config: ModelConfig,
    precisions: Precisions,
    shape: ChunkShape,
    *,
    sequences: Sequence[int],
) -> RooflineReport:
    """Measure at a model's sizes.

    `shape` is that of a stream's chunks; decode steps are of `sequences` sequences each. Raises
    OptionError on a machine without a GPU.
    """
    if not torch.cuda.is_available():
        raise OptionError("The roofline is that of a GPU, and torch sees none here.")
    rates = measure_rates({precisions.blocks, precisions.head, precisions.vision})
    text, vision = (
        text_products(config.text, precisions),
        vision_products(config.vision, precisions),
    )
    work: list[tuple[Step, list[Product]]] = [
        *(
            (decode_step(config.text, precisions, rates, count, shape.context), text)
            for count in sequences
        ),
        (prefill_step(config.text, precisions, rates, shape.prompt, shape.context), text),
        (vision_step(config.vision, rates, shape.grid), vision),
    ]
    times: dict[tuple[Product, int], ProductTime] = {}
    floors = []
    for step, products in work:
        for part in products:
            rows = step.rows_of(part)
            if (part, rows) not in times:
                times[part, rows] = ProductTime(
                    part.name,
                    part.channels,
                    part.depth,
                    rows,
                    seconds=_time_product(part, rows),
                    floor=part.floor(rows, rates),
                )
        floors.append(
            StepFloor(
                step.kind,
                step.sequences,
                step.rows,
                linear=step.linear(products, rates),
                attention=step.attention,
                measured=sum(
                    part.count * times[part, step.rows_of(part)].seconds for part in products
                ),
            )
        )
    return RooflineReport(
        workload,
        str(precisions),
        shape.context,
        rates.bandwidth,
        dict(rates.operations),
        tuple(sorted(times.values(), key=lambda time: (time.name, time.rows))),
        tuple(floors),
        chunk_floor(config, precisions, rates, shape),
        most_streams(config, precisions, rates, shape),
    )


def _time_product(part: Product, rows: int) -> float:
    size = part.channels * part.depth * BYTES[part.precision]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(1, -(-_CACHES * cache // size))
    inputs = random_values(rows, part.depth, part.precision)
    out = torch.empty((rows, part.channels), dtype=ACTIVATIONS, device="cuda")
    layers = [random_weights(part.channels, part.depth, part.precision) for _ in range(copies)]
    return time_calls([product(weights, inputs, out) for weights in layers])
