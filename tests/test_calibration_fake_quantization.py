"""Simulated quantization in torch against its definition in numpy float64, and its properties."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the simulation runs in torch")

from reference.dense_model import load_model  # noqa: E402
from reference.graph_files import load_executor, write_graphs  # noqa: E402
from reference.paged_stream import PAGE, PagedStream, make_conversation  # noqa: E402
from reference.quantized_checkpoint import write_quantized_checkpoint  # noqa: E402

from framesink.calibration.fake_cache import (  # noqa: E402
    FakeCache,
    KeyForm,
    KeysPerChannel,
    KeysPerChannelWithBias,
    KeysPerPair,
    KeysPerTensorRotated,
)
from framesink.calibration.fake_quantization import FakeLinear, FakeQuantization  # noqa: E402
from framesink.calibration.fake_rounding import fake_quantize  # noqa: E402
from framesink.calibration.formats import (  # noqa: E402
    FP8,
    INT4,
    INT8,
    NumberFormat,
    dequantize,
    quantize,
)
from framesink.calibration.torch_executor import TorchExecutor  # noqa: E402
from framesink.calibration.torch_layers import rotate  # noqa: E402
from framesink.runtime.arrays import AnyArray, Float32Array  # noqa: E402
from framesink.runtime.executors.base import Executor  # noqa: E402
from framesink.runtime.models.checkpoint import Checkpoint  # noqa: E402
from framesink.runtime.models.quantization import (  # noqa: E402
    CacheScheme,
    LinearScheme,
    Quantization,
    k_channel_scale,
    v_head_scale,
)
from framesink.runtime.preprocess import Grid  # noqa: E402

FORMATS = [FP8, INT8, INT4]
HEADS, DIM, ROWS = 2, 8, 40
GRID = Grid(1, 6, 8)
# Quantization is not continuous: a value within float32's rounding of a tie may get the next code,
# and all after it another value. So the simulation runs in float64 here.
TOLERANCE = 1e-4


def _random(*shape: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _tensor(values: AnyArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _rounded(values: AnyArray, scale: AnyArray, number_format: NumberFormat) -> AnyArray:
    """The definition in float64: the nearest of all codes of the format, times the scale."""
    if number_format is FP8:
        bytes_ = np.arange(256, dtype=np.uint8).view(FP8.dtype).astype(np.float64)
        codes = np.unique(bytes_[np.isfinite(bytes_)])
    else:
        codes = np.arange(number_format.lowest, number_format.highest + 1)
    scaled = values.astype(np.float64) / scale
    above = np.clip(np.searchsorted(codes, scaled), 1, len(codes) - 1)
    low, high = codes[above - 1], codes[above]
    nearest = np.where(scaled - low <= high - scaled, low, high)
    rounded: AnyArray = np.clip(nearest, number_format.lowest, number_format.highest) * scale
    return rounded


def _rotary(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = _tensor(np.random.default_rng(7).uniform(0, 6, size=(rows, DIM // 2)))
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda f: f.name)
def test_codes_are_those_of_the_formats(number_format: NumberFormat) -> None:
    values = np.concatenate([_random(2000) * 3, [0.0, -0.0, 1e9, -1e9, 0.5, 1.5]])
    values = values.astype(np.float32)
    scale = np.float32(0.0123)
    found = fake_quantize(_tensor(values), float(scale), number_format).numpy()
    expected = dequantize(quantize(values, scale, number_format), scale)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("scheme", "number_format"),
    [(LinearScheme.FP8, FP8), (LinearScheme.INT8, INT8)],
)
def test_a_quantized_linear_is_the_product_of_rounded_factors(
    scheme: LinearScheme, number_format: NumberFormat
) -> None:
    inputs, weight, bias = _random(ROWS, 24), _random(16, 24, seed=1), _random(16, seed=2)
    scale = np.abs(inputs).max() / number_format.highest * 0.9
    numerics = FakeQuantization({"layer": FakeLinear(scheme, input_scale=float(scale))})
    found = numerics.linear("layer", _tensor(inputs), _tensor(weight), _tensor(bias)).numpy()
    rows = np.abs(weight).max(axis=1, keepdims=True) / number_format.highest
    expected = (
        _rounded(inputs, scale, number_format) @ _rounded(weight, rows, number_format).T + bias
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_smoothing_moves_range_from_inputs_to_weights() -> None:
    """An input channel of large range that small weights read: INT8 drowns the other channels in
    it, with SmoothQuant it does not."""
    inputs, weight = _random(ROWS, 24), _random(16, 24, seed=1)
    inputs[:, 3] *= 300.0
    weight[:, 3] /= 300.0
    exact = inputs.astype(np.float64) @ weight.T.astype(np.float64)
    factors = np.ones(24, np.float32)
    factors[3] = 1 / 300
    errors = []
    for smoothing, read in ((factors, inputs * factors), (None, inputs)):
        fake = FakeLinear(LinearScheme.INT8, float(np.abs(read).max() / 127), smoothing)
        numerics = FakeQuantization({"layer": fake})
        found = numerics.linear("layer", _tensor(inputs), _tensor(weight), None)
        errors.append(float(np.linalg.norm(found.numpy() - exact) / np.linalg.norm(exact)))
    smoothed, plain = errors
    assert smoothed < 0.02
    assert plain > 0.5


@pytest.mark.parametrize(
    ("scheme", "number_format", "group"),
    [(LinearScheme.INT8_WEIGHT_ONLY, INT8, 48), (LinearScheme.INT4_WEIGHT_ONLY, INT4, 16)],
)
def test_weight_only_leaves_inputs_alone(
    scheme: LinearScheme, number_format: NumberFormat, group: int
) -> None:
    inputs, weight = _random(ROWS, 48), _random(16, 48, seed=1)
    numerics = FakeQuantization({"layer": FakeLinear(scheme, int4_group=16)})
    found = numerics.linear("layer", _tensor(inputs), _tensor(weight), None).numpy()
    amax = np.abs(weight).reshape(16, -1, group).max(axis=2).repeat(group, axis=1)
    expected = inputs @ _rounded(weight, amax / number_format.highest, number_format).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_large_model_is_simulated_without_keeping_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, weights = _random(5, 32), [_random(16, 32, seed=seed) for seed in (1, 2)]
    fake = FakeLinear(LinearScheme.INT8_WEIGHT_ONLY)
    made: list[torch.Tensor] = []

    def run() -> list[AnyArray]:
        numerics = FakeQuantization({"0": fake, "1": fake})
        layers = [("0", weights[0]), ("1", weights[1])] * 2
        return [
            numerics.linear(name, _tensor(inputs), _tensor(weight), None).numpy()
            for name, weight in layers
        ]

    quantize_weight = FakeLinear.weight

    def count(self: FakeLinear, weight: torch.Tensor) -> torch.Tensor:
        made.append(weight)
        return quantize_weight(self, weight)

    monkeypatch.setattr(FakeLinear, "weight", count)
    small = run()
    assert len(made) == 2
    monkeypatch.setattr("framesink.calibration.fake_quantization.KEPT_BYTES", weights[0].nbytes)
    large = run()
    assert len(made) == 2 + 3  # the first is kept, the second made again
    for found, expected in zip(large, small, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_layers_that_are_not_named_are_untouched() -> None:
    inputs, weight = _tensor(_random(ROWS, 24)), _tensor(_random(16, 24, seed=1))
    numerics = FakeQuantization({"other": FakeLinear(LinearScheme.INT4_WEIGHT_ONLY)})
    assert torch.equal(numerics.linear("layer", inputs, weight, None), inputs @ weight.T)
    keys = _tensor(_random(ROWS, HEADS, DIM))
    assert numerics.stored_keys(0, keys, torch.zeros(HEADS, DIM), _rotary(ROWS)) is keys
    assert numerics.stored_values(0, keys) is keys


@pytest.mark.parametrize("number_format", [FP8, INT8], ids=lambda f: f.name)
def test_keys_and_values_are_rounded_as_defined(number_format: NumberFormat) -> None:
    keys, values = _random(ROWS, HEADS, DIM), _random(ROWS, HEADS, DIM, seed=1)
    bias = _random(HEADS, DIM, seed=2) * 50
    channels = np.abs(keys).max(axis=0) / number_format.highest
    heads = np.abs(values).max(axis=(0, 2)) / number_format.highest
    form = KeysPerChannel(channels.reshape(-1))
    cache = FakeCache(number_format, (form,), (heads,))
    numerics = FakeQuantization({}, cache)
    found = numerics.stored_keys(0, _tensor(keys), _tensor(bias), _rotary(ROWS)).numpy()
    np.testing.assert_allclose(found, _rounded(keys, channels, number_format), rtol=1e-5)
    found = numerics.stored_values(0, _tensor(values)).numpy()
    expected = _rounded(values, heads[:, None], number_format)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_pair_norms_bound_rotated_keys() -> None:
    """With scales from the norms of pairs nothing saturates at any angle: the error stays within
    half a step of each channel, and rotating back keeps it within a step of the pair."""
    keys = _random(ROWS, HEADS, DIM)
    half = DIM // 2
    norms = np.hypot(keys[..., :half], keys[..., half:]).max(axis=0)
    scale = norms / INT8.highest
    found = KeysPerPair(scale.reshape(-1)).stored(
        _tensor(keys), torch.zeros(HEADS, DIM), _rotary(ROWS), INT8
    )
    error = (found - _tensor(keys)).numpy()
    worst = np.hypot(error[..., :half], error[..., half:]).max(axis=0)
    assert (worst <= scale * np.sqrt(0.5) * 1.001 + 1e-6).all()


def test_a_large_bias_costs_only_the_forms_that_store_it() -> None:
    keys = _random(ROWS, HEADS, DIM)
    bias = np.zeros((HEADS, DIM), np.float32)
    bias[:, DIM // 2 - 1] = 200.0
    rotary = _rotary(ROWS)
    rotated = rotate(_tensor(keys + bias), rotary).abs().max()
    half = DIM // 2
    norms = np.hypot(keys[..., :half], keys[..., half:]).max(axis=0)
    forms: dict[str, KeyForm] = {
        "channel": KeysPerChannel((np.abs(keys).max(axis=0) / 127).reshape(-1)),
        "pair": KeysPerPair((norms / 127).reshape(-1)),
        "rotated": KeysPerTensorRotated(float(rotated) / 127),
        "biased": KeysPerChannelWithBias((np.abs(keys + bias).max(axis=0) / 127).reshape(-1)),
    }
    error = {
        name: float((form.stored(_tensor(keys), _tensor(bias), rotary, INT8) - _tensor(keys)).std())
        for name, form in forms.items()
    }
    assert max(error["channel"], error["pair"]) < 0.01
    assert error["rotated"] > 0.3
    assert error["biased"] > 0.1
    # Without a bias all forms hold what they are given.
    for form in forms.values():
        small = form.stored(_tensor(keys), torch.zeros(HEADS, DIM), rotary, INT8)
        assert torch.isfinite(small).all()


@pytest.mark.parametrize(
    ("scheme", "cache"),
    [
        (LinearScheme.FP8, CacheScheme.FP8),
        (LinearScheme.INT8, CacheScheme.INT8),
        (LinearScheme.INT8_WEIGHT_ONLY, CacheScheme.UNQUANTIZED),
        (LinearScheme.INT4_WEIGHT_ONLY, CacheScheme.UNQUANTIZED),
    ],
)
def test_the_simulation_is_what_the_graphs_compute(
    scheme: LinearScheme, cache: CacheScheme, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The plain checkpoint under simulation, and the graphs of the quantized one in ONNX Runtime,
    with the same scales, step by step over pages."""
    quantization = write_quantized_checkpoint(
        tiny_checkpoint, tmp_path / "quantized", scheme, cache
    )
    quantized = Checkpoint.open(tmp_path / "quantized")
    write_graphs(tmp_path / "quantized", tmp_path / "graphs", compute_type="float32")
    linears = {name: _same_scales(quantized, name, quantization) for name in quantization.linears}
    executors: list[Executor] = [
        load_executor(tmp_path / "graphs", num_pages=32),
        TorchExecutor(
            Checkpoint.open(tiny_checkpoint),
            num_pages=32,
            page_size=PAGE,
            dtype=torch.float64,
            numerics=FakeQuantization(linears, _same_cache(quantized, cache)),
        ),
    ]
    talk = make_conversation(load_model(tiny_checkpoint), 1, GRID, before=9, after=14)
    graph_vision, vision = (each.encode_vision(talk.patches, GRID) for each in executors)
    assert np.abs(vision - graph_vision).max() < TOLERANCE * np.abs(graph_vision).max()
    streams = [PagedStream(each, talk, list(range(1, 32)), seed=0) for each in executors]
    for count in (7, 9, 1, 5):
        graph, found = (
            executor.step([stream.next(count)])[0]
            for executor, stream in zip(executors, streams, strict=True)
        )
        assert graph is not None
        assert found is not None
        assert np.abs(found - graph).max() < TOLERANCE * np.abs(graph).max()
    for executor in executors:
        executor.close()


def _same_scales(checkpoint: Checkpoint, name: str, quantization: Quantization) -> FakeLinear:
    def find(suffix: str) -> AnyArray | None:
        tensor = f"{name}.{suffix}"
        return np.asarray(checkpoint.read(tensor)) if tensor in checkpoint.tensors else None

    scale = find("input_scale")
    return FakeLinear(
        quantization.scheme(name),
        None if scale is None else float(scale),
        find("pre_quant_scale"),
        quantization.int4_group,
    )


def _same_cache(checkpoint: Checkpoint, scheme: CacheScheme) -> FakeCache | None:
    if scheme is CacheScheme.UNQUANTIZED:
        return None
    layers = range(checkpoint.config.text.num_hidden_layers)
    return FakeCache(
        INT8 if scheme is CacheScheme.INT8 else FP8,
        tuple(KeysPerChannel(np.asarray(checkpoint.read(k_channel_scale(i)))) for i in layers),
        tuple(np.asarray(checkpoint.read(v_head_scale(i))) for i in layers),
    )
