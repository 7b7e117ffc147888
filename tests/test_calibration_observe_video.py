"""Observing a stream: video in, statistics out, and what is refused."""

import gc
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CheckpointError, OptionError, VideoError
from framesink.runtime.executors import create_executor
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.preprocess import PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="calibration runs in torch")

from framesink.calibration.collector import BINS  # noqa: E402
from framesink.calibration.recorded_turns import StreamSettings, record_turns  # noqa: E402
from framesink.calibration.statistics import Statistics  # noqa: E402
from framesink.calibration.statistics_files import (  # noqa: E402
    STATISTICS_NAME,
    TENSORS_NAME,
    load_statistics,
    save_statistics,
)
from framesink.calibration.streaming import observe_streaming  # noqa: E402
from framesink.calibration.videos import find_videos, open_streams  # noqa: E402

SMALL_WINDOW = StreamingDefaults(
    sink_text=6, recent_text=6, vision_seconds=4.0, reply_turns=4, max_new_tokens=4
)
PREPROCESS = PreprocessConfig(min_pixels=56 * 56, max_pixels=56 * 84)


def settings_of(directory: Path) -> StreamSettings:
    return StreamSettings(
        Checkpoint.open(directory).config,
        ChatProtocol(Tokenizer.from_directory(directory)),
        PREPROCESS,
        SMALL_WINDOW,
        Limits(max_streams=1, max_context=2048, max_prefill=256, max_patches=128),
    )


def observe(directory: Path, *videos: Path, chunks: int, minimum: int = 1) -> Statistics:
    return observe_streaming(
        Checkpoint.open(directory),
        settings_of(directory),
        videos,
        chunks=chunks,
        minimum_chunks=minimum,
    )


@pytest.fixture(scope="module")
def write_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    """Videos of moving noise, by name and length in seconds, in one folder."""
    import cv2

    folder = tmp_path_factory.mktemp("videos")

    def write(name: str, seconds: float) -> Path:
        path = folder / name
        random = np.random.default_rng(len(name))
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 8.0, (84, 56))
        assert writer.isOpened()
        for _ in range(round(8 * seconds)):
            writer.write(random.integers(0, 256, (56, 84, 3), dtype=np.uint8))
        writer.release()
        return path

    return write


def copy_with(source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a checkpoint whose weights `change` changed in place."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def named(tensors: dict[str, np.ndarray], ending: str) -> np.ndarray:
    (name,) = [name for name in tensors if name.endswith(ending)]
    return tensors[name]


def test_the_stream_is_the_one_that_is_served(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """Evictions and replies included: another executor, live, computes as many rows."""
    chunks = 20
    settings = settings_of(tiny_checkpoint)
    executor, _ = create_executor(
        Bundle.open(tiny_bundle, check="sizes"),
        "onnxruntime",
        num_pages=settings.num_pages(16),
        threads=1,
    )
    stream = islice(open_streams((), PREPROCESS, 1.0)[0], chunks)
    turns = list(record_turns(executor, settings, stream))
    executor.close()
    rows = [len(step.sequence.token_ids) for turn in turns for step in turn.steps]
    largest = max(
        int(step.sequence.context.valid.sum()) for turn in turns[4:] for step in turn.steps
    )
    assert largest < sum(rows) / 2, "nothing was evicted"

    statistics = observe(tiny_checkpoint, chunks=chunks)
    assert statistics.chunks == chunks
    assert statistics.source == "generated scene"
    assert statistics.layers[0].rows == sum(rows)
    assert statistics.linears["visual.patch_embed.proj"].rows == sum(
        turn.grid.patches for turn in turns
    )


def test_videos_share_the_chunks(
    tiny_checkpoint: Path, write_video: Callable[[str, float], Path]
) -> None:
    short, long = write_video("a.avi", 2.0), write_video("b.avi", 9.0)
    (short.parent / "notes.txt").write_text("no video")
    assert find_videos([short.parent, short]) == [short, long, short]
    done: list[float] = []
    statistics = observe_streaming(
        Checkpoint.open(tiny_checkpoint),
        settings_of(tiny_checkpoint),
        [short.parent],
        chunks=8,
        minimum_chunks=8,
        on_progress=done.append,
    )
    assert statistics.chunks == 8
    assert statistics.source == "a.avi, b.avi"
    assert done == [number / 8 for number in range(1, 9)]
    assert statistics.linears["visual.patch_embed.proj"].rows == 8 * 24


def test_too_little_video_is_refused(
    tiny_checkpoint: Path, write_video: Callable[[str, float], Path], tmp_path: Path
) -> None:
    video = write_video("c.avi", 3.0)
    with pytest.raises(VideoError, match=r"yields 3 chunks of 1 s, and at least 5 are needed"):
        observe(tiny_checkpoint, video, chunks=9, minimum=5)
    with pytest.raises(OptionError, match="4 chunks are fewer than the 5"):
        observe(tiny_checkpoint, video, chunks=4, minimum=5)
    with pytest.raises(VideoError, match="holds no video"):
        observe(tiny_checkpoint, tmp_path, chunks=9)
    with pytest.raises(VideoError):
        observe(tiny_checkpoint, tmp_path / "missing.mp4", chunks=9)


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("layers.1.self_attn.o_proj.weight", r"model\.layers\.1\.mlp\.gate_proj"),
        ("layers.2.self_attn.k_proj.weight", r"model\.layers\.2\.self_attn\.k_proj"),
        ("layers.0.self_attn.v_proj.weight", r"model\.layers\.0\.self_attn\.v_proj"),
        ("visual.blocks.1.mlp.up_proj.weight", r"visual\.blocks\.1\.mlp\.down_proj"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stop_with_the_name_of_the_layer(
    tiny_checkpoint: Path, tmp_path: Path, weight: str, layer: str, value: float
) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        named(tensors, weight)[0, 0] = value

    damaged = copy_with(tiny_checkpoint, tmp_path / "damaged", damage)
    with pytest.raises(CheckpointError, match=rf"{layer} holds NaN or infinite"):
        observe(damaged, chunks=1)


def test_dead_and_constant_channels_are_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = observe(tiny_checkpoint, chunks=2)
    assert before.dead_channels == before.constant_channels == 0

    def deaden(tensors: dict[str, np.ndarray]) -> None:
        named(tensors, "layers.1.input_layernorm.weight")[[3, 5]] = 0.0
        named(tensors, "layers.2.self_attn.k_proj.weight")[7] = 0.0
        named(tensors, "visual.blocks.0.attn.qkv.weight")[-1] = 0.0
        named(tensors, "visual.blocks.0.attn.qkv.bias")[-1] = 0.5

    statistics = observe(copy_with(tiny_checkpoint, tmp_path / "dead", deaden), chunks=2)
    assert statistics.dead_channels == 3
    assert statistics.linears["model.layers.1.self_attn.v_proj"].channels.dead == 2
    assert statistics.layers[2].keys.dead == 1
    # A weighted mean of equal values is that value but for rounding.
    attended = statistics.linears["visual.blocks.0.attn.proj"].channels
    assert attended.maximum[-1] - attended.minimum[-1] < 1e-6
    assert attended.amax[-1] == pytest.approx(0.5)


def test_memory_does_not_grow_with_the_video(tiny_checkpoint: Path) -> None:
    """Tensors alive after a third of it and at its end: statistics and pages, no activations."""
    live: list[int] = []

    def measure(done: float) -> None:
        if done not in (1 / 3, 1.0):
            return
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        live.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))

    observe_streaming(
        Checkpoint.open(tiny_checkpoint),
        settings_of(tiny_checkpoint),
        chunks=24,
        on_progress=measure,
    )
    after_a_third, at_the_end = live
    assert at_the_end <= 1.02 * after_a_third


def test_statistics_survive_their_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    statistics = observe(tiny_checkpoint, chunks=2)
    save_statistics(statistics, tmp_path)
    loaded = load_statistics(tmp_path)
    assert (loaded.checkpoint, loaded.source, loaded.chunks) == (
        statistics.checkpoint,
        statistics.source,
        statistics.chunks,
    )
    assert list(loaded.linears) == list(statistics.linears)
    for name, linear in statistics.linears.items():
        found = loaded.linears[name]
        assert_equal(
            [found.amax, found.channels.minimum, found.mean_square, found.histogram.counts],
            [linear.amax, linear.channels.minimum, linear.mean_square, linear.histogram.counts],
        )
        assert found.histogram.amax == linear.histogram.amax
        assert (found.rows, found.histogram.limit) == (linear.rows, linear.histogram.limit)
        assert len(found.histogram.counts) == BINS
    for cache, expected in zip(loaded.layers, statistics.layers, strict=True):
        assert_equal(
            [cache.key_channel_amax, cache.key_pair_amax, cache.value_head_amax],
            [expected.key_channel_amax, expected.key_pair_amax, expected.value_head_amax],
        )
        assert cache.rotated_key_amax == expected.rotated_key_amax


def assert_equal(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_damaged_statistics_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no calibration statistics"):
        load_statistics(tmp_path)
    save_statistics(observe(tiny_checkpoint, chunks=1), tmp_path)
    tensors = load_file(tmp_path / TENSORS_NAME)
    del tensors["layer.1.key_pair_amax"]
    save_file(tensors, tmp_path / TENSORS_NAME)
    with pytest.raises(CheckpointError, match=r"layer\.1\.key_pair_amax"):
        load_statistics(tmp_path)
    (tmp_path / STATISTICS_NAME).write_text('{"version": 2}')
    with pytest.raises(CheckpointError, match="holds no calibration statistics"):
        load_statistics(tmp_path)
