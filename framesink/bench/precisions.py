"""What the parts of a model are held in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["bf16", "fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
BYTES: Mapping[Precision, int] = {"bf16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class Precisions:
    """`blocks` and `vision` are those of the linear layers in the blocks of the language model and
    of the vision encoder, `head` that of the projection to the vocabulary, `cache` that of K/V.
    All else is in 16 bits."""

    blocks: Precision
    head: Precision
    cache: Precision
    vision: Precision

    def __str__(self) -> str:
        return (
            f"{self.blocks} linear layers, {self.head} head, {self.cache} K/V, "
            f"{self.vision} vision encoder"
        )
