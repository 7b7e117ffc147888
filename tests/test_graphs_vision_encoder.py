"""The vision encoder's graph against transformers' vision tower."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from reference.graph_files import VISION_ENCODER, load_executor, write_graphs

from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.vision_segments import frame_segments, window_segments
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import vision_rotary

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

TOLERANCE = {"float32": 1e-5, "float16": 1e-2}
# The tiny model's windows are 4 × 4 patches.
GRIDS = [
    pytest.param(Grid(1, 8, 12), id="whole windows"),
    pytest.param(Grid(1, 10, 6), id="windows cut off"),
    pytest.param(Grid(1, 2, 2), id="one token"),
    pytest.param(Grid(3, 6, 10), id="three temporal steps"),
    pytest.param(Grid(1, 2, 30), id="a strip"),
]


@pytest.fixture(scope="module", params=["float32", "float16"])
def compute_type(request: pytest.FixtureRequest) -> ComputeType:
    name: ComputeType = request.param
    return name


@pytest.fixture(scope="module")
def graphs(
    compute_type: ComputeType, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("graphs")
    write_graphs(tiny_checkpoint, directory, compute_type=compute_type)
    return directory


def random_patches(grids: list[Grid]) -> NDArray[np.float32]:
    count = sum(grid.patches for grid in grids)
    return np.random.default_rng(0).standard_normal((count, 1176)).astype(np.float32)


def reference(
    model: "Qwen2_5_VLForConditionalGeneration", patches: NDArray[np.float32], grids: list[Grid]
) -> NDArray[np.float64]:
    import torch

    sizes = torch.tensor([[grid.t, grid.h, grid.w] for grid in grids])
    with torch.no_grad():
        output = model.model.visual(torch.from_numpy(patches).to(model.dtype), grid_thw=sizes)
    embeddings: NDArray[np.float64] = output.pooler_output.numpy()
    return embeddings


def assert_close(
    actual: NDArray[np.float32], expected: NDArray[np.float64], compute_type: ComputeType
) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE[compute_type] * np.abs(expected).max()


@pytest.mark.parametrize("grid", GRIDS)
def test_embeddings(
    grid: Grid,
    graphs: Path,
    compute_type: ComputeType,
    tiny_model: "Qwen2_5_VLForConditionalGeneration",
) -> None:
    patches = random_patches([grid])
    embeddings = load_executor(graphs, num_pages=2).encode_vision(patches, grid)
    assert embeddings.dtype == np.float32
    assert_close(embeddings, reference(tiny_model, patches, [grid]), compute_type)


def test_several_inputs_in_one_call(
    graphs: Path, compute_type: ComputeType, tiny_model: "Qwen2_5_VLForConditionalGeneration"
) -> None:
    """Frames of one patch count but of unlike shape: no input sees another."""
    grids = [Grid(1, 6, 10), Grid(2, 10, 6), Grid(1, 30, 2)]
    config = Checkpoint.open(graphs).config.vision
    dtype = np.dtype(compute_type)
    patches = random_patches(grids)
    windows, frames = window_segments(grids, config), frame_segments(grids)
    cos, sin = vision_rotary(grids, config, dtype)
    session = onnxruntime.InferenceSession(graphs / VISION_ENCODER)
    (embeddings,) = session.run(
        None,
        {
            "patches": patches.astype(dtype),
            "cos": cos,
            "sin": sin,
            "window_index": windows.index,
            "window_inverse": windows.inverse,
            "window_mask": windows.mask.astype(dtype),
            "frame_index": frames.index,
            "frame_inverse": frames.inverse,
        },
    )
    assert_close(embeddings, reference(tiny_model, patches, grids), compute_type)


@pytest.mark.parametrize(("blocks", "absent"), [((0, 1, 2), "window"), ((), "frame")])
def test_inputs_that_no_block_reads_are_not_declared(
    blocks: tuple[int, ...], absent: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import json

    def set_full_blocks(path: Path) -> None:
        config = json.loads(path.read_text())
        config["vision_config"]["fullatt_block_indexes"] = list(blocks)
        path.write_text(json.dumps(config))

    source = tmp_path / "checkpoint"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((tiny_checkpoint / name).read_bytes())
    set_full_blocks(source / "config.json")
    write_graphs(source, tmp_path / "graphs", compute_type="float32")

    graph = onnx_ir.load(tmp_path / "graphs" / VISION_ENCODER).graph
    assert not [value.name for value in graph.inputs if value.name.startswith(absent)]
    assert all(value.uses() for value in graph.inputs)

    from reference.dense_model import load_model

    grid = Grid(2, 6, 10)
    patches = random_patches([grid])
    embeddings = load_executor(tmp_path / "graphs", num_pages=2).encode_vision(patches, grid)
    assert_close(embeddings, reference(load_model(source), patches, [grid]), "float32")
