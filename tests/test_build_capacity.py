"""What a build is expected to take, and what the machine is found to have."""

from dataclasses import replace
from pathlib import Path

import pytest

from framesink.build.estimate import BuildEstimate, StageEstimate, compiled_bytes, estimate_build
from framesink.build.host import available_memory
from framesink.calibration.recipe import Recipe
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError
from framesink.runtime.models.config import ModelConfig, TextConfig, VisionConfig

# Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
VISION_3B = VisionConfig(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    out_hidden_size=2048,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
    window_size=112,
    fullatt_block_indexes=(7, 15, 23, 31),
    tokens_per_second=2.0,
)
TEXT_3B = TextConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    max_position_embeddings=128000,
    tie_word_embeddings=True,
)
MODEL_3B = ModelConfig("qwen2_5_vl", TEXT_3B, VISION_3B, 151656, 151652, 151653)
MODEL_7B = replace(
    MODEL_3B,
    text=replace(
        TEXT_3B,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
    vision=replace(VISION_3B, out_hidden_size=3584),
)


def test_a_24_gb_host_takes_3b_and_refuses_7b() -> None:
    memory, disk = 24 * 10**9, 10**12
    estimate_build(MODEL_3B, observe=True, plans=True).check(
        available_memory=memory, free_disk=disk
    )
    large = estimate_build(MODEL_7B, observe=True, plans=True)
    with pytest.raises(CapacityError, match=r"needs about 2\d\.\d GB of memory.*24\.0 GB are"):
        large.check(available_memory=memory, free_disk=disk)
    # Without plans a 7B checkpoint passes through a few hundred megabytes.
    estimate_build(MODEL_7B, observe=True, plans=False).check(
        available_memory=4 * 10**9, free_disk=disk
    )


def test_a_24_gb_host_takes_7b_in_fp8_without_the_gate() -> None:
    quantization = Recipe(language_model="fp8", vision_encoder="fp8").resolve(MODEL_7B)

    def check(*, gate: bool) -> None:
        estimate_build(
            MODEL_7B,
            observe=True,
            plans=True,
            quantization=quantization,
            quantize=True,
            calibrate=True,
            gate=gate,
        ).check(available_memory=24 * 10**9, free_disk=20 * 10**9)

    check(gate=False)
    with pytest.raises(CapacityError, match=r"stage: quality gate.*or pass --no-gate\.$"):
        check(gate=True)
    # Codes, and the head in 16 bits.
    compiled = compiled_bytes(MODEL_7B, quantization)["language_model"]
    assert compiled == pytest.approx(7.62e9, rel=0.01)


def test_the_sizes_estimated_are_those_written(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check="sizes")
    estimate = estimate_build(bundle.manifest.model, observe=False, plans=False)
    weights = bundle.path("weights.safetensors").stat().st_size
    assert estimate.disk == pytest.approx(weights, rel=0.05)  # and a header of names
    embedding = 2 * bundle.manifest.model.text.vocab_size * bundle.manifest.model.text.hidden_size
    assert sum(compiled_bytes(bundle.manifest.model).values()) == estimate.disk - embedding


def test_too_little_of_anything_is_refused_with_the_figures() -> None:
    estimate = BuildEstimate((StageEstimate("one", 3 * 10**9, 10**9), StageEstimate("two", 1, 1)))
    with pytest.raises(CapacityError, match=r"3\.0 GB of memory \(stage: one\) and 2\.5 GB"):
        estimate.check(available_memory=25 * 10**8, free_disk=10**12)
    with pytest.raises(CapacityError, match=r"1\.0 GB of disk and 0\.5 GB are free"):
        estimate.check(available_memory=10**10, free_disk=5 * 10**8)


@pytest.mark.parametrize(
    ("membership", "group", "limit", "used", "cache"),
    [
        ("0::/a/b", "a", "memory.max", "memory.current", "inactive_file"),
        ("0::/gone/from/here", "", "memory.max", "memory.current", "inactive_file"),
        (
            "7:cpu,memory:/a",
            "memory/a",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_memory_is_what_the_control_group_leaves(
    tmp_path: Path, membership: str, group: str, limit: str, used: str, cache: str
) -> None:
    (tmp_path / "membership").write_text(membership + "\n")
    directory = tmp_path / "root" / group
    directory.mkdir(parents=True)
    (directory / limit).write_text("1000000\n")
    (directory / used).write_text("600000\n")
    (directory / "memory.stat").write_text(f"anon 500000\n{cache} 100000\n")
    assert available_memory(tmp_path / "root", tmp_path / "membership") == 500_000
    (directory / limit).write_text("max\n")
    assert available_memory(tmp_path / "root", tmp_path / "membership") > 1_000_000


def test_the_rows_of_one_stream_are_reckoned_with() -> None:
    """In float32, once where torch runs alone and once more for the bundle's own in the gate."""

    def memory(context: int) -> dict[str, int]:
        estimate = estimate_build(
            MODEL_7B,
            observe=True,
            plans=False,
            calibrate=True,
            compare=True,
            gate=True,
            context=context,
        )
        return {stage.name: stage.memory for stage in estimate.stages}

    without, with_rows = memory(0), memory(16_384)
    grown = {name: with_rows[name] - without[name] for name in without}
    # 28 layers of K and V, 4 heads of 128.
    rows = 16_384 * 28 * 2 * 4 * 128 * 4
    expected = {"calibrate": rows, "compare precisions": rows, "quality gate": 2 * rows}
    assert {name: size for name, size in grown.items() if size} == expected
