"""The floors of `framesink bench roofline` against figures worked out by hand."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from reference.triton_device import HAS_GPU

from framesink.bench import roofline
from framesink.bench.report import write_json
from framesink.bench.roofline import measure_roofline
from framesink.bench.roofline_report import RooflineReport, roofline_table
from framesink.build.random_checkpoint import write_random_description
from framesink.cli.bench import bench
from framesink.runtime.errors import OptionError

BANDWIDTH, PEAK = 4.26e12, 1.4e15


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RooflineReport:
    """Of the 7B model in FP8 on a GPU whose every product takes a microsecond."""
    config = write_random_description("7b", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr(roofline, "_copy_bandwidth", lambda: BANDWIDTH)
        patch.setattr(roofline, "_peak", lambda weight_type: PEAK / weight_type.itemsize)
        patch.setattr(roofline, "_time_product", lambda product, rows, weight_type: 1e-6)
        return measure_roofline(
            "W720", config.text, "fp8", context=13_312, prompt=748, sequences=(1, 40)
        )


def test_floors_of_seven_billion_weights(report: RooflineReport) -> None:
    one, forty, prefill = report.steps
    # 28 layers of 233 M weights and a vocabulary of 152,064 × 3,584, a byte each.
    assert one.linear == pytest.approx(7.07e9 / BANDWIDTH, rel=2e-3)
    assert forty.linear == one.linear
    # 57,344 bytes a token.
    assert one.attention == pytest.approx(13_312 * 57_344 / BANDWIDTH)
    assert forty.attention == pytest.approx(40 * one.attention)
    # 6.53 G weights, twice 748 operations each; the last token's logits read half a gigabyte.
    operations = 2 * 748 * 6.525e9
    assert prefill.linear == pytest.approx(operations / PEAK + 0.545e9 / BANDWIDTH, rel=2e-3)
    pairs = 748 * 13_312 + 748 * 748 / 2
    assert prefill.attention == pytest.approx(28 * 4 * pairs * 28 * 128 / (PEAK / 2))
    assert [step.measured for step in report.steps] == pytest.approx([113e-6] * 3)


def test_a_report_as_table_and_as_json(report: RooflineReport, tmp_path: Path) -> None:
    table = roofline_table(report)
    assert table.row_count == len(report.products) + len(report.steps) == 14 + 3
    write_json(report, tmp_path / "roofline.json")
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert content["benchmark"] == "roofline"
    assert content["bandwidth"] == BANDWIDTH
    assert len(content["products"]) == 14


def test_sizes_must_be_given() -> None:
    result = CliRunner().invoke(bench, ["roofline", "--engines", "bundle"])
    assert isinstance(result.exception, OptionError)
    assert "--random-weights" in str(result.exception)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    result = CliRunner().invoke(bench, ["roofline", "--random-weights", "7b"])
    assert isinstance(result.exception, OptionError)
    assert "GPU" in str(result.exception)
