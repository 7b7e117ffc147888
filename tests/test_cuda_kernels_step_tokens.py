"""Both ends of a decode step against plain torch: on a GPU, or in Triton's interpreter."""

import pytest

# First of all: it says how kernels are run here.
from reference.triton_device import DEVICE, HAS_GPU  # isort: skip

import torch
from reference import plain_kernels
from torch import Tensor

from framesink.runtime.executors.base import NEXT_TOKEN
from framesink.runtime.executors.cuda.kernels.step_tokens import (
    NOT_FINITE,
    Choosing,
    TileChanges,
    begin_step,
    choose_likeliest,
)
from framesink.runtime.executors.cuda.kernels.tiles import TILE_ROWS, DeviceTiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32) if HAS_GPU else (torch.float32,)
VOCABULARIES = [40, 2048, 4097, 152_064] if HAS_GPU else [40, 4097]
CONTEXTS, TILES = 9, 5


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 3584])
def test_the_beginning_of_a_step(dtype: torch.dtype, size: int) -> None:
    embedding = torch.randn((50, size), generator=torch.Generator().manual_seed(1))
    embedding = embedding.to(DEVICE, dtype)
    rows = torch.tensor([4, 0, 7, 8], dtype=torch.int32, device=DEVICE)
    last_tokens = integers(0, 50, CONTEXTS)
    last_tokens[8] = NOT_FINITE
    tokens = torch.tensor([3, NEXT_TOKEN, 49, NEXT_TOKEN], dtype=torch.int32, device=DEVICE)
    # The step's integers, of which every part is a slice, with columns for sequences to come.
    given = integers(0, 1000, TILE_ROWS + 3, 6)
    given[0] %= TILES
    given = given[:, :4]
    changes = TileChanges(given[0], given[1], given[3:], given[2])

    results = []
    for operation in (begin_step, plain_kernels.begin_step):
        tiles = DeviceTiles(
            integers(0, 9, CONTEXTS, TILES, seed=2),
            integers(0, 9, CONTEXTS, TILES, TILE_ROWS, seed=3),
            integers(0, 9, CONTEXTS, seed=4),
            rows,
        )
        hidden = torch.full((4, size), torch.nan, device=DEVICE, dtype=dtype)
        operation(tokens, last_tokens, embedding, tiles, changes, hidden)
        results.append((hidden, tiles.bases, tiles.slots, tiles.counts))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    fed = [3, int(last_tokens[0]), 49, 0]
    assert torch.equal(results[0][0], embedding[fed])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_likeliest_tokens(dtype: torch.dtype, vocabulary: int) -> None:
    batch = 7
    logits = torch.randn((batch, vocabulary), generator=torch.Generator().manual_seed(vocabulary))
    logits = logits.to(DEVICE, dtype)
    logits[1] = -3.0  # all alike: the lowest that is allowed
    logits[2, -1] = 90.0
    logits[3, vocabulary // 2] = torch.nan
    logits[4, 5] = torch.inf
    logits[5] = -torch.inf
    logits[6, 0] = torch.nan  # but it is never chosen
    choosing = Choosing.make(vocabulary, CONTEXTS, torch.device(DEVICE))
    never = [0, 1, int(logits[0].argmax())]
    choosing.allowed[never] = 0
    rows = torch.tensor([3, 1, 4, 8, 5, 2, 6], dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second finds the counters as the first left them
        tokens = torch.full((batch,), 77, dtype=torch.int32, device=DEVICE)
        choosing.last_tokens.fill_(-7)
        choose_likeliest(logits, rows, choosing, tokens)
        assert torch.equal(choosing.last_tokens[rows], tokens)
        assert choosing.last_tokens[[0, 7]].tolist() == [-7, -7]
        permitted = logits.float()
        permitted[:, never] = -torch.inf
        expected = permitted.argmax(dim=1)
        assert tokens[[0, 6]].tolist() == expected[[0, 6]].tolist()
        assert tokens[1] == min(set(range(4)) - set(never))
        assert tokens[2] == vocabulary - 1
        assert tokens[3:6].tolist() == [NOT_FINITE] * 3
