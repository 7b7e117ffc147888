"""The floors of `framesink bench roofline` against figures worked out by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from reference.triton_device import HAS_GPU

from framesink.bench import roofline
from framesink.bench.floors import (
    ChunkShape,
    GpuRates,
    decode_step,
    text_products,
    vision_step,
)
from framesink.bench.precisions import Precisions
from framesink.bench.random_engine import quantization_of
from framesink.bench.report_json import write_json
from framesink.bench.roofline import measure_roofline
from framesink.bench.roofline_report import RooflineReport, roofline_table
from framesink.build.random_checkpoint import random_tensors, write_random_description
from framesink.cli.bench import bench
from framesink.runtime.errors import OptionError
from framesink.runtime.models.vision_segments import window_segments
from framesink.runtime.preprocess import Grid

BANDWIDTH, PEAK = 4.26e12, 1.4e15
FP8 = Precisions(blocks="fp8", head="bf16", cache="bf16", vision="fp8")
W720 = ChunkShape(Grid(1, 40, 72), prompt=748, context=13_312, steps=19)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RooflineReport:
    """Of the 7B model in FP8 on a GPU whose every product takes a microsecond."""
    config = write_random_description("7b", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        rates = GpuRates(BANDWIDTH, {"bf16": PEAK / 2, "fp8": PEAK})
        patch.setattr(roofline, "measure_rates", lambda precisions: rates)
        patch.setattr(roofline, "_time_product", lambda product, rows: 1e-6)
        return measure_roofline("W720", config, FP8, W720, sequences=(1, 40))


def test_floors_of_seven_billion_weights(report: RooflineReport) -> None:
    one, forty, prefill, vision = report.steps
    # 28 layers of 233 M weights, a byte each, and a vocabulary of 152,064 × 3,584, two bytes each.
    assert one.linear == pytest.approx((6.525e9 + 2 * 0.545e9) / BANDWIDTH, rel=2e-3)
    assert forty.linear == one.linear
    # 57,344 bytes a token.
    assert one.attention == pytest.approx(13_312 * 57_344 / BANDWIDTH)
    assert forty.attention == pytest.approx(40 * one.attention)
    # 6.53 G weights, twice 748 operations each; the last token's logits read half a gigabyte.
    operations = 2 * 748 * 6.525e9
    assert prefill.linear == pytest.approx(operations / PEAK + 1.09e9 / BANDWIDTH, rel=2e-3)
    pairs = 748 * 13_312 + 748 * 748 / 2
    assert prefill.attention == pytest.approx(28 * 4 * pairs * 28 * 128 / (PEAK / 2))
    # Five products in each layer of the language model but the vocabulary, four in each block of
    # the vision encoder, which has three more.
    assert [step.measured for step in report.steps] == pytest.approx([113e-6] * 3 + [131e-6])
    # A block: 4·1280² + 3·1280·3424 weights; 2,880 patches, two operations each.
    blocks = 32 * (4 * 1280**2 + 3 * 1280 * 3424)
    others = 1280 * 1176 + (5120**2 + 3584 * 5120) / 4
    assert vision.linear == pytest.approx(2 * 2880 * (blocks / PEAK + others / (PEAK / 2)))


def test_pairs_that_share_a_window_are_those_the_encoder_masks(tmp_path: Path) -> None:
    config = write_random_description("7b", tmp_path).vision
    rates = GpuRates(BANDWIDTH, {"bf16": 1.0})
    for grid in (Grid(1, 40, 72), Grid(2, 8, 8), Grid(3, 12, 20), Grid(1, 4, 34)):
        sizes = (window_segments([grid], config).mask == 0.0).sum(axis=(1, 2, 3))
        pairs = 28 * (sizes**2).sum() + 4 * grid.t * (grid.h * grid.w) ** 2
        assert vision_step(config, rates, grid).attention == 4 * 1280 * pairs


def test_one_byte_caches_and_heads_are_half_as_much_to_read(tmp_path: Path) -> None:
    config = write_random_description("7b", tmp_path)
    rates = GpuRates(BANDWIDTH, {"bf16": PEAK / 2, "fp8": PEAK})
    small = replace(FP8, head="fp8", cache="fp8")
    for sequences in (1, 40):
        wide = decode_step(config.text, FP8, rates, sequences, 13_312)
        narrow = decode_step(config.text, small, rates, sequences, 13_312)
        assert wide.attention == pytest.approx(2 * narrow.attention)
        saved = wide.linear(text_products(config.text, FP8), rates) - narrow.linear(
            text_products(config.text, small), rates
        )
        assert saved == pytest.approx(152_064 * 3584 / BANDWIDTH)


def test_a_chunk_is_its_parts_and_streams_fill_a_second(report: RooflineReport) -> None:
    one, _, prefill, vision = report.steps
    ttft = prefill.linear + prefill.attention + vision.linear + vision.attention
    assert report.chunk.ttft == pytest.approx(ttft)
    # The tokens of the prompt are in the context that decode steps read.
    step = one.linear + one.attention * (13_312 + 748) / 13_312
    assert report.chunk.chunk == pytest.approx(ttft + 19 * step)

    def filled(streams: int) -> float:
        reading = streams * (13_312 + 748) * 57_344 / BANDWIDTH
        return streams * ttft + 19 * (one.linear + reading)

    assert filled(report.live_streams) <= 1.0 < filled(report.live_streams + 1)
    assert 30 < report.live_streams < 60


def test_what_random_weights_are_held_in(tmp_path: Path) -> None:
    config = write_random_description("7b", tmp_path)
    precisions = Precisions(blocks="int8", head="fp8", cache="int8", vision="bf16")
    found = quantization_of(config, precisions)
    assert found.scheme("lm_head") == "fp8"
    assert found.scheme("model.layers.27.mlp.down_proj") == "int8"
    assert found.scheme("visual.blocks.0.attn.qkv") == "16bit"
    assert found.scheme("visual.merger.mlp.0") == "16bit"
    scales = random_tensors(config, found)["model.layers.3.self_attn.k_proj.k_channel_scale"]
    assert (scales.shape, scales.deviation) == ((512,), 0.0)
    assert scales.mean * 127 == pytest.approx(10.0)


def test_a_report_as_table_and_as_json(report: RooflineReport, tmp_path: Path) -> None:
    table = roofline_table(report)
    assert table.row_count == len(report.products) + len(report.steps) + 3 == 21 + 4 + 3
    write_json(report, tmp_path / "roofline.json")
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert content["benchmark"] == "roofline"
    assert content["bandwidth"] == BANDWIDTH
    assert len(content["products"]) == 21


def test_sizes_must_be_given() -> None:
    result = CliRunner().invoke(bench, ["roofline", "--engines", "bundle"])
    assert isinstance(result.exception, OptionError)
    assert "--random-weights" in str(result.exception)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    result = CliRunner().invoke(bench, ["roofline", "--random-weights", "7b"])
    assert isinstance(result.exception, OptionError)
    assert "GPU" in str(result.exception)
