"""Attention on pages against dense attention in float64, to what the pages hold.

On a GPU in 16 bits; without one in Triton's interpreter, in float32.
"""

import numpy as np
import pytest
import torch
from reference import triton_device
from reference.attention_run import (
    TOLERANCE,
    Run,
    Sequence,
    assert_close,
    device_rows,
    make_run,
    tables_of,
    to_device,
)
from reference.paged_contexts import PagedRows, Sizes, joined

from framesink.runtime.executors.cuda.kernels.gather_context import ALIGNMENT, gather_context
from framesink.runtime.models.quantization import CacheScheme

SMALL = Sizes(heads=6, key_heads=2, head_dim=32, page_size=8, sections=(4, 6, 6))
LARGE = Sizes(heads=28, key_heads=4, head_dim=128, page_size=16, sections=(16, 24, 24))
WIDE = Sizes(heads=4, key_heads=4, head_dim=64, page_size=32, sections=(8, 12, 12))
DTYPES = (torch.bfloat16, torch.float16) if triton_device.HAS_GPU else (torch.float32,)
# Triton's interpreter takes its time.
SPANS = 8 if triton_device.HAS_GPU else 3
NEW_TOKENS = (150, 1, 9) if triton_device.HAS_GPU else (24, 1, 5)
ALL_SIZES = [SMALL, WIDE, LARGE] if triton_device.HAS_GPU else [SMALL, WIDE]
CASES = [
    (sizes, splits, scheme)
    for sizes in ALL_SIZES
    for splits in (1, 3, None)
    for scheme in CacheScheme
]
if not triton_device.HAS_GPU:
    CASES = [
        (SMALL, 1, CacheScheme.UNQUANTIZED),
        (SMALL, None, CacheScheme.FP8),
        (SMALL, 2, CacheScheme.INT8),
        (WIDE, 3, CacheScheme.UNQUANTIZED),
        (WIDE, 3, CacheScheme.FP8),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "splits", "scheme"), CASES)
def test_decode_writes_its_rows_and_attends_to_what_the_masks_show(
    sizes: Sizes, dtype: torch.dtype, splits: int | None, scheme: CacheScheme
) -> None:
    run, generator = make_run(sizes, 1, dtype, (1, 1, 1), SPANS, scheme)
    expected = run.held()
    run.erase_new_rows()
    result = run.decode(generator, splits)
    assert_held(run, expected, dtype)
    if scheme is not CacheScheme.UNQUANTIZED:
        run.take_over(run.pool.written)
    assert_close(result[:-1], run.reference(), dtype)
    assert not result[-1].any()  # a sequence that only fills up the batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "splits", "scheme"), CASES)
def test_prefill_attends_to_the_context_and_to_itself_in_order(
    sizes: Sizes, dtype: torch.dtype, splits: int | None, scheme: CacheScheme
) -> None:
    run, generator = make_run(sizes, 2, dtype, NEW_TOKENS, SPANS, scheme)
    run.erase_new_rows()
    run.append()
    if scheme is not CacheScheme.UNQUANTIZED:
        run.take_over(run.pool.written)
    assert_close(run.prefill(generator, splits), run.reference(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_prompt_has_no_context(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(3)
    pool = PagedRows(SMALL, 30, generator)
    rows = joined([pool.write("text", 21, vision=False)])
    run = Run(SMALL, [Sequence(rows, 21)], pool, dtype)
    run.append()
    assert_close(run.prefill(generator, None), run.reference(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_codes_stand_for_the_gathered_values(dtype: torch.dtype) -> None:
    run, generator = make_run(SMALL, 7, dtype, (24, 1, 5), SPANS, CacheScheme.FP8)
    run.append()
    new = [sequence.new for sequence in run.sequences]
    rows = device_rows(tables_of([s.context for s in run.sequences], SMALL, generator))
    starts = to_device(np.cumsum([0, *new, 0]).astype(np.int32))
    arguments = (run.qkv, run.rotary, starts, max(new), rows, run.pages)
    keys, values = gather_context(*arguments)
    same_keys, codes = gather_context(*arguments, value_codes=True)
    found = codes.view(torch.uint8).unflatten(3, (-1, 4, 2, 2)).permute(0, 1, 3, 5, 4, 6, 2)
    found = found.flatten(2, 5).contiguous().view(torch.float8_e4m3fn).float()
    assert run.pages.codes is not None
    found = (found * run.pages.codes.value_scale[None, :, None, None]).to(dtype)
    for sequence, (count, fresh) in enumerate(zip(rows.counts.tolist(), new, strict=False)):
        # Zeros follow up to the end of a tile.
        end = -(-(count + fresh) // ALIGNMENT) * ALIGNMENT
        assert values[sequence, :, :count].any()
        assert torch.equal(found[sequence, :, :end], values[sequence, :, :end])
        assert torch.equal(same_keys[sequence, :, :end], keys[sequence, :, :end])


@pytest.mark.parametrize("scheme", CacheScheme)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", ALL_SIZES)
def test_rows_are_rotated_by_position_and_stored_by_place(
    sizes: Sizes, dtype: torch.dtype, scheme: CacheScheme
) -> None:
    run, _ = make_run(sizes, 4, dtype, (24, 3), 2, scheme)
    slots = run.slots[:-1]
    expected = run.held()
    run.erase_new_rows()
    run.append()
    assert_held(run, expected, dtype)
    if scheme is not CacheScheme.UNQUANTIZED:
        run.take_over(slots)
    rotated = [
        sizes.rotate(rows, run.positions[:, :-1].astype(np.int32)).flatten(1)
        for rows in (run.queries[:-1], run.pool.keys[slots])
    ]
    values = run.pool.values[slots].flatten(1)
    assert_close(run.qkv[:-1].double().cpu(), torch.cat([*rotated, values], dim=1), dtype)


def assert_held(run: Run, expected: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    """The pages hold what is expected; a number between two codes may have become either."""
    found = run.held()
    for stored, written in zip(found[:2], expected[:2], strict=True):
        if run.pages.codes is None:
            assert_close(stored, written, dtype)
        else:
            assert (stored != written).float().mean() < TOLERANCE[dtype]
            torch.testing.assert_close(stored, written, rtol=0.13, atol=0.05)
    for places, given in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(places, given)
