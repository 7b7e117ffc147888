"""The numpy forward that watches activations: it is transformers' model, and it sees overflow."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from framesink.calibration.activation_range import observe_activations
from framesink.calibration.observer import RangeObserver
from framesink.calibration.prompt import build_prompt, embed_prompt
from framesink.calibration.ranges import ActivationRanges
from framesink.calibration.samples import generate_chunks
from framesink.calibration.text_forward import run_language_model
from framesink.calibration.vision_forward import run_vision_encoder
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.preprocess import Grid, PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

SMALL = PreprocessConfig(min_pixels=56 * 56, max_pixels=112 * 112)


def _observe(directory: Path) -> ActivationRanges:
    chunks = [next(generate_chunks(2, size=112))]
    return observe_activations(
        Checkpoint.open(directory),
        ChatProtocol(Tokenizer.from_directory(directory)),
        SMALL,
        chunks,
        chunk_seconds=1.0,
        source="test",
    )


def _copy_with(source: Path, target: Path, name: str, factor: float) -> Path:
    """A copy of a checkpoint in which one weight is multiplied."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    (match,) = [key for key in tensors if key.endswith(name)]
    tensors[match] = tensors[match] * factor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("grid", [Grid(1, 8, 8), Grid(2, 6, 10), Grid(1, 4, 14)])
def test_vision_encoder_is_that_of_transformers(tiny_checkpoint: Path, grid: Grid) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    patches = np.random.default_rng(1).standard_normal((grid.patches, 1176)).astype(np.float32)
    with torch.no_grad():
        expected = model.model.visual(
            torch.from_numpy(patches), grid_thw=torch.tensor([[grid.t, grid.h, grid.w]])
        ).pooler_output
    checkpoint = Checkpoint.open(tiny_checkpoint)
    found = run_vision_encoder(checkpoint, patches, grid, RangeObserver())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_language_model_is_that_of_transformers(tiny_checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    protocol = ChatProtocol(Tokenizer.from_directory(tiny_checkpoint))
    random = np.random.default_rng(2)
    grids = [Grid(1, 8, 8), Grid(2, 4, 6)]
    vision = [random.standard_normal((grid.tokens(2), 64)).astype(np.float32) for grid in grids]
    ids, positions = build_prompt(protocol, checkpoint.config, SMALL, grids, 1.0)
    inputs = embed_prompt(checkpoint, ids, vision)
    observer = RangeObserver()
    found = run_language_model(checkpoint, inputs, positions, observer)
    with torch.no_grad():
        output = model(
            inputs_embeds=torch.from_numpy(inputs)[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[:, None],
            output_hidden_states=True,
        )
    np.testing.assert_allclose(found, output.logits[0, -1].numpy(), rtol=1e-3, atol=1e-3)
    seen = {layer.layer: layer.maxima for layer in observer.ranges().layers}
    for index in range(2):  # the last hidden state of transformers is after the final norm
        largest = float(output.hidden_states[index + 1].abs().max())
        residual = seen[f"model.layers.{index}"]["residual_after_mlp"]
        assert residual == pytest.approx(largest, rel=1e-4)


def test_positions_of_a_prompt_follow_the_reference_rule(tiny_checkpoint: Path) -> None:
    from reference.positions import mrope_positions

    checkpoint = Checkpoint.open(tiny_checkpoint)
    protocol = ChatProtocol(Tokenizer.from_directory(tiny_checkpoint))
    grids = [Grid(1, 8, 8), Grid(3, 4, 6)]
    ids, positions = build_prompt(protocol, checkpoint.config, SMALL, grids, 1.0)
    step = SMALL.temporal_patch_size / SMALL.fps * checkpoint.config.vision.tokens_per_second
    expected = mrope_positions(
        ids.tolist(),
        [(grid.t, grid.h, grid.w) for grid in grids],
        video_pad=protocol.video_pad,
        merge_size=2,
        time_steps=[step] * len(grids),
    )
    assert positions.T.tolist() == [list(place) for place in expected]


def test_an_ordinary_checkpoint_fits_fp16(tiny_checkpoint: Path, tmp_path: Path) -> None:
    ranges = _observe(tiny_checkpoint)
    assert ranges.language_model.compute_type == "float16"
    assert ranges.vision_encoder.compute_type == "float16"
    assert ActivationRanges.read(ranges.write(tmp_path)) == ranges


@pytest.mark.parametrize(
    ("weight", "part"),
    [
        ("layers.1.mlp.down_proj.weight", "language_model"),
        ("blocks.1.mlp.down_proj.weight", "vision_encoder"),
    ],
)
def test_activations_beyond_fp16_are_seen_where_they_are(
    tiny_checkpoint: Path, tmp_path: Path, weight: str, part: str
) -> None:
    ranges = _observe(_copy_with(tiny_checkpoint, tmp_path / "large", weight, 3e5))
    assert ranges.part(part).compute_type == "bfloat16"
    value, place = ranges.part(part).largest
    assert value > 65504
    assert weight.split(".mlp")[0] in place or "residual" in place
    other = "vision_encoder" if part == "language_model" else "language_model"
    assert ranges.part(other).compute_type == "float16"


def test_nan_stops_with_the_name_of_the_layer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    damaged = _copy_with(
        tiny_checkpoint, tmp_path / "nan", "layers.2.self_attn.o_proj.weight", float("nan")
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.o_proj"):
        _observe(damaged)
