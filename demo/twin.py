"""Writes a twin of a checkpoint whose keys have a large constant part, as Qwen2.5's have.

    python -m demo.twin demo/model twins/k-bias --size 30 --pairs 2

The bias of K grows on the slowest rotary pairs of every head. A constant part of all keys adds the
same to every score of a query, which softmax does not see; rotary embedding makes it depend on the
distance, least on the slowest pairs. So the twin says nearly what the model says, while whatever
quantizes K with its bias has to spend its range on it.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from framesink.runtime.models.checkpoint import WEIGHTS_NAME, Checkpoint
from framesink.runtime.models.weights import canonical_name

DEFAULT_SIZE = 100.0
DEFAULT_PAIRS = 2


def write_twin(source: Path, output: Path, *, size: float, pairs: int) -> None:
    """Copy the checkpoint in `source`, with `size` added to the K bias of the `pairs` slowest
    rotary pairs of every key head. The weights must be one safetensors file, `output` new."""
    config = Checkpoint.open(source).config.text
    half = config.head_dim // 2
    # What the source's precisions cost is not what the twin's do.
    shutil.copytree(source, output, ignore=shutil.ignore_patterns("accuracy.*"))
    weights = load_file(source / WEIGHTS_NAME)
    for name, values in weights.items():
        if canonical_name(name).endswith("self_attn.k_proj.bias"):
            heads = values.reshape(config.num_key_value_heads, config.head_dim).copy()
            # Pair j is the channels j and j + D/2 and turns by theta^(-2j/D) a position.
            heads[:, half - pairs : half] += np.asarray(size, dtype=values.dtype)
            weights[name] = heads.reshape(-1)
    save_file(weights, output / WEIGHTS_NAME, metadata={"format": "pt"})


def main() -> None:
    """Write a twin."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=float, default=DEFAULT_SIZE, help="added to the bias")
    parser.add_argument("--pairs", type=int, default=DEFAULT_PAIRS, help="rotary pairs per head")
    options = parser.parse_args()
    write_twin(options.source, options.output, size=options.size, pairs=options.pairs)


if __name__ == "__main__":
    main()
