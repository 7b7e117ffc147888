"""The least time of a step of a model on a GPU, by arithmetic.

A step takes at least as long as moving its bytes once, and as its operations at the rate of a large
product (Williams et al., 2009). Embeddings, norms and activations are left out: they are small.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from framesink.bench.precisions import BYTES, Precision, Precisions
from framesink.runtime.models.config import ModelConfig, TextConfig, VisionConfig
from framesink.runtime.preprocess import Grid

# The executor pads the vision encoder's inner size to whole tiles.
_INNER_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class GpuRates:
    """`bandwidth` bytes a second read from memory, `operations` a second of a large product in each
    precision; a product of a and b counts as two."""

    bandwidth: float
    operations: Mapping[Precision, float]


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer `[channels, depth]` that a step runs `count` times; over `rows_each` rows of
    the step it is one row (the vision encoder's merger: four patches). `for_logits` is the one over
    the vocabulary, which takes only rows whose logits are wanted."""

    name: str
    channels: int
    depth: int
    count: int
    precision: Precision
    rows_each: int = 1
    for_logits: bool = False

    def floor(self, rows: int, rates: GpuRates) -> float:
        """Seconds of one run over `rows` rows of its own."""
        size = self.channels * self.depth
        reading = size * BYTES[self.precision] / rates.bandwidth
        return max(reading, 2 * rows * size / rates.operations[self.precision])


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the language model or, of kind `vision`, through the vision encoder:
    `sequences` that want a token and `rows` in all. `attention` is its floor, in seconds."""

    kind: str
    sequences: int
    rows: int
    attention: float

    def rows_of(self, product: Product) -> int:
        """How many rows a product has in this step."""
        return self.sequences if product.for_logits else self.rows // product.rows_each

    def linear(self, products: list[Product], rates: GpuRates) -> float:
        """Seconds of all its linear layers, at their floors."""
        return sum(
            product.count * product.floor(self.rows_of(product), rates) for product in products
        )


def text_products(config: TextConfig, precisions: Precisions) -> list[Product]:
    """The linear layers of the language model, those that share an input as one."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    shapes = {
        "q, k, v": ((heads + 2 * key_heads) * config.head_dim, hidden),
        "attention output": (hidden, heads * config.head_dim),
        "gate, up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    blocks = [Product(name, *shape, layers, precisions.blocks) for name, shape in shapes.items()]
    vocabulary = Product(
        "vocabulary", config.vocab_size, hidden, 1, precisions.head, for_logits=True
    )
    return [*blocks, vocabulary]


def vision_products(config: VisionConfig, precisions: Precisions) -> list[Product]:
    """The linear layers of the vision encoder; those outside of its blocks are in 16 bits."""
    hidden, unit = config.hidden_size, config.merge_unit
    inner = -(-config.intermediate_size // _INNER_MULTIPLE) * _INNER_MULTIPLE
    shapes = {
        "vision q, k, v": (3 * hidden, hidden),
        "vision attention output": (hidden, hidden),
        "vision gate, up": (2 * inner, hidden),
        "vision down": (hidden, inner),
    }
    blocks = [
        Product(name, *shape, config.depth, precisions.vision) for name, shape in shapes.items()
    ]
    merged = unit * hidden
    return [
        Product("patch embedding", hidden, config.patch_dim, 1, "bf16"),
        *blocks,
        Product("merger, inner", merged, merged, 1, "bf16", rows_each=unit),
        Product("merger, outer", config.out_hidden_size, merged, 1, "bf16", rows_each=unit),
    ]


def decode_step(
    config: TextConfig, precisions: Precisions, rates: GpuRates, sequences: int, context: int
) -> Step:
    """One token of each of `sequences`, after `context` tokens."""
    attention = _attention(config, precisions, rates, sequences, sequences, context)
    return Step("decode", sequences, sequences, attention)


def prefill_step(
    config: TextConfig, precisions: Precisions, rates: GpuRates, prompt: int, context: int
) -> Step:
    """`prompt` tokens of one sequence, after `context` tokens."""
    attention = _attention(config, precisions, rates, 1, prompt, context)
    return Step("prefill", 1, prompt, attention)


def vision_step(config: VisionConfig, rates: GpuRates, grid: Grid) -> Step:
    """The frames of one chunk."""
    full = len(config.fullatt_block_indexes)
    windowed = config.depth - full
    pairs = full * (grid.h * grid.w) ** 2 + windowed * _window_pairs(config, grid)
    operations = 4 * grid.t * pairs * config.hidden_size
    return Step("vision", 0, grid.patches, operations / rates.operations["bf16"])


@dataclass(frozen=True, slots=True)
class ChunkFloor:
    """The least time of one chunk and of its parts, seconds; `decode_step` is one of its
    `steps`."""

    vision: float
    prefill: float
    decode_step: float
    ttft: float
    chunk: float


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """A chunk of `grid` that comes with `prompt` tokens after `context`, answered with one token
    and, step by step, `steps` more."""

    grid: Grid
    prompt: int
    context: int
    steps: float


def chunk_floor(
    config: ModelConfig, precisions: Precisions, rates: GpuRates, shape: ChunkShape
) -> ChunkFloor:
    """The floor of such a chunk alone."""
    text = text_products(config.text, precisions)
    vision = _total(
        vision_step(config.vision, rates, shape.grid),
        vision_products(config.vision, precisions),
        rates,
    )
    prefill = _total(
        prefill_step(config.text, precisions, rates, shape.prompt, shape.context), text, rates
    )
    context = shape.context + shape.prompt
    decode = _total(decode_step(config.text, precisions, rates, 1, context), text, rates)
    ttft = vision + prefill
    return ChunkFloor(vision, prefill, decode, ttft, ttft + shape.steps * decode)


def most_streams(
    config: ModelConfig, precisions: Precisions, rates: GpuRates, shape: ChunkShape
) -> int:
    """How many streams with such a chunk a second fill a second, if all decode together."""
    ttft = chunk_floor(config, precisions, rates, shape).ttft
    text = text_products(config.text, precisions)
    context = shape.context + shape.prompt
    streams, filled = -1, 0.0
    while filled <= 1.0:
        streams += 1
        step = decode_step(config.text, precisions, rates, streams + 1, context)
        filled = (streams + 1) * ttft + shape.steps * _total(step, text, rates)
    return streams


def _total(step: Step, products: list[Product], rates: GpuRates) -> float:
    return step.attention + step.linear(products, rates)


def _attention(
    config: TextConfig,
    precisions: Precisions,
    rates: GpuRates,
    sequences: int,
    rows: int,
    context: int,
) -> float:
    """Seconds of reading K/V, or of two products of the head's size for every pair of a row and
    what it sees."""
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    row = 2 * config.num_key_value_heads * config.head_dim * BYTES[precisions.cache]
    seen = context + rows / sequences / 2
    return max(
        layers * sequences * context * row / rates.bandwidth,
        layers * 4 * rows * seen * width / rates.operations["bf16"],
    )


def _window_pairs(config: VisionConfig, grid: Grid) -> int:
    """Pairs of patches that share an attention window, of one temporal step."""
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size * merge

    def squares(length: int) -> int:
        whole, rest = divmod(length, side)
        return whole * side * side + rest * rest

    return squares(grid.h) * squares(grid.w)
