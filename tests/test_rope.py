"""Rotary tables and attention segments against transformers' own."""

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framesink.runtime.models.config import ModelConfig, parse_config
from framesink.runtime.models.vision_segments import (
    MASKED,
    Segments,
    frame_segments,
    window_patches,
    window_segments,
)
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import INITIAL_POSITIONS, MRopeTable, vision_rotary

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

GRIDS = [
    [Grid(1, 8, 8)],
    [Grid(1, 10, 6)],
    [Grid(3, 4, 14)],
    [Grid(2, 2, 2)],
    [Grid(1, 6, 10), Grid(2, 10, 6), Grid(1, 2, 30)],
]
grid_sides = st.integers(1, 9).map(lambda merged: 2 * merged)
grids = st.lists(st.builds(Grid, st.integers(1, 3), grid_sides, grid_sides), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> ModelConfig:
    return parse_config(json.loads((tiny_checkpoint / "config.json").read_text()))


def test_mrope_tables(
    config: ModelConfig, tiny_model: "Qwen2_5_VLForConditionalGeneration"
) -> None:
    import torch

    positions = np.random.default_rng(0).integers(0, 9000, (3, 2, 50)).astype(np.int32)
    expected = tiny_model.model.language_model.rotary_emb(
        torch.zeros(1, dtype=torch.float32), torch.from_numpy(positions).long()
    )
    half = config.text.head_dim // 2
    for table, reference in zip(
        MRopeTable(config.text, np.float32).lookup(positions), expected, strict=True
    ):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, reference[..., :half].numpy(), atol=2e-6)


def test_a_table_grows_without_changing_what_it_said(config: ModelConfig) -> None:
    table = MRopeTable(config.text, np.float16)
    positions = np.arange(0, INITIAL_POSITIONS, 7, dtype=np.int32)[None].repeat(3, axis=0)
    before = table.lookup(positions)
    table.lookup(np.full((3, 1), 5 * INITIAL_POSITIONS, np.int32))
    np.testing.assert_array_equal(table.lookup(positions), before)
    assert before.dtype == np.float16


@pytest.mark.parametrize("grids", GRIDS)
def test_vision_tables(
    config: ModelConfig, tiny_model: "Qwen2_5_VLForConditionalGeneration", grids: list[Grid]
) -> None:
    import torch
    from transformers.vision_utils import get_vision_position_ids

    sizes = torch.tensor([[grid.t, grid.h, grid.w] for grid in grids])
    positions = get_vision_position_ids(sizes, config.vision.spatial_merge_size)
    expected = tiny_model.model.visual.rotary_pos_emb(positions, positions)
    half = config.vision.head_dim // 2
    tables = vision_rotary(grids, config.vision, np.float32)
    for table, reference in zip(tables, expected, strict=True):
        np.testing.assert_allclose(table, reference[..., :half].numpy(), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(grids=grids)
def test_windows_hold_the_patches_transformers_puts_together(
    config: ModelConfig, grids: list[Grid]
) -> None:
    import torch
    from transformers.vision_utils import get_vision_window_index

    vision = config.vision
    order, ends = get_vision_window_index(
        torch.tensor([[grid.t, grid.h, grid.w] for grid in grids]),
        vision.spatial_merge_size,
        vision.window_size,
        vision.patch_size,
    )
    patches = (order[:, None] * vision.merge_unit + torch.arange(vision.merge_unit)).flatten()
    expected = {frozenset(patches[a:b].tolist()) for a, b in pairwise(ends)}

    segments = window_segments(grids, vision)
    assert segments.index.shape[1] == window_patches(vision)
    assert set(patches_by_segment(segments)) == expected
    check_inverse(segments, sum(grid.patches for grid in grids))


def test_frames_are_the_temporal_steps() -> None:
    segments = frame_segments([Grid(2, 4, 6), Grid(1, 2, 12)])
    assert patches_by_segment(segments) == [
        frozenset(range(24)),
        frozenset(range(24, 48)),
        frozenset(range(48, 72)),
    ]
    assert not segments.mask.any()
    check_inverse(segments, 72)


def test_frames_of_unlike_size_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of patches"):
        frame_segments([Grid(1, 4, 4), Grid(1, 4, 6)])


def patches_by_segment(segments: Segments) -> list[frozenset[int]]:
    visible = segments.mask[:, 0, 0] != MASKED
    return [
        frozenset(row[seen].tolist()) for row, seen in zip(segments.index, visible, strict=True)
    ]


def check_inverse(segments: Segments, patches: int) -> None:
    """Every patch is found again where `inverse` says, at a place that is no padding."""
    np.testing.assert_array_equal(segments.index.reshape(-1)[segments.inverse], np.arange(patches))
    assert not segments.mask.reshape(-1)[segments.inverse].any()
