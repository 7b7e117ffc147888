"""The numpy front end against the processor of transformers."""

import numpy as np
import pytest

from framesink.runtime.errors import VideoError
from framesink.runtime.preprocess import PreprocessConfig, frames_to_patches, smart_resize

transformers = pytest.importorskip("transformers", reason="the reference needs transformers")


@pytest.mark.parametrize(("height", "width"), [(112, 112), (140, 196), (480, 640), (360, 1280)])
def test_patches_equal_those_of_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = PreprocessConfig(min_pixels=28 * 28, max_pixels=602_112)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, height * width).reshape(height, width, 1)
    frame = (ramp + rng.integers(0, 40, (height, width, 3))).astype(np.uint8)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    )
    expected = processor(images=[frame], return_tensors="np")
    patches, grid = frames_to_patches(np.stack([frame, frame]), config)
    assert (grid.t, grid.h, grid.w) == tuple(expected["image_grid_thw"][0])
    difference = np.abs(patches - expected["pixel_values"])
    if (grid.h * 14, grid.w * 14) == (height, width):
        assert difference.max() < 1e-5
    else:  # OpenCV's resampler is not Pillow's; the layout is what must agree
        assert difference.mean() < 0.05


def test_patches_equal_a_plain_loop() -> None:
    """Three frames (the last is repeated), every number its own: order and padding, in float64."""
    config = PreprocessConfig(patch_size=4, merge_size=2, min_pixels=1, max_pixels=10**6)
    frames = np.random.default_rng(1).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    patches, grid = frames_to_patches(frames, config)
    assert (grid.t, grid.h, grid.w) == (2, 4, 6)
    padded = np.concatenate([frames, frames[-1:]]).astype(np.float64) / 255
    normal = (padded - np.asarray(config.mean)) / np.asarray(config.std)
    expected = []
    for step in range(2):
        for block in np.ndindex(2, 3):
            for place in np.ndindex(2, 2):
                y, x = (4 * (2 * block[axis] + place[axis]) for axis in (0, 1))
                patch = normal[2 * step : 2 * step + 2, y : y + 4, x : x + 4]
                expected.append(patch.transpose(3, 0, 1, 2).ravel())
    np.testing.assert_allclose(patches, np.stack(expected), rtol=0, atol=1e-6)


def test_720p_becomes_720_tokens() -> None:
    size = smart_resize(720, 1280, factor=28, min_pixels=100_352, max_pixels=602_112)
    assert size == (560, 1008)
    assert size[0] * size[1] // 28**2 == 720


def test_impossible_frames_are_refused() -> None:
    limits = {"factor": 28, "min_pixels": 784, "max_pixels": 602_112}
    with pytest.raises(VideoError, match="no area"):
        smart_resize(0, 100, **limits)
    with pytest.raises(VideoError, match="200 times"):
        smart_resize(10, 2001, **limits)
