"""Pieces of the CUDA executor, each against the code it must agree with."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="the executor runs in torch")

# First of all: it says how kernels are run here.
from reference import triton_device  # noqa: E402, F401, I001
from reference import plain_kernels  # noqa: E402

from framesink.build.random_checkpoint import (  # noqa: E402
    SIZES,
    quantize_blocks,
    random_tensors,
    write_random_description,
)
from framesink.calibration.formats import pack_int4  # noqa: E402
from framesink.runtime.errors import CapacityError  # noqa: E402
from framesink.runtime.executors.base import ContextView, SequenceInput  # noqa: E402
from framesink.runtime.executors.cuda.context_tables import ContextTables  # noqa: E402
from framesink.runtime.executors.cuda.kernels.step_tokens import NOT_FINITE  # noqa: E402
from framesink.runtime.executors.cuda.staging import Staging  # noqa: E402
from framesink.runtime.executors.cuda.token_choice import TokenChooser  # noqa: E402
from framesink.runtime.executors.cuda.weights import (  # noqa: E402
    INNER_MULTIPLE,
    load_language_model,
    load_vision_encoder,
)
from framesink.runtime.models.config import ModelConfig  # noqa: E402
from framesink.runtime.models.quantization import LinearScheme, Quantization  # noqa: E402
from framesink.runtime.sampler import Sampler, SamplingParams  # noqa: E402

CPU = torch.device("cpu")


def test_the_likeliest_tokens_are_those_of_the_sampler() -> None:
    random = np.random.default_rng(3)
    logits = random.standard_normal((64, 40)).astype(np.float32)
    suppressed = frozenset({0, 7, int(logits[0].argmax())})
    chooser = TokenChooser(40, 80, plain_kernels, CPU)
    sampler = Sampler(SamplingParams(), suppressed)
    assert chooser.serves(sampler.choice())
    assert chooser.serves(Sampler(SamplingParams(temperature=2.0), suppressed).choice())
    assert not chooser.serves(Sampler(SamplingParams(), suppressed | {1}).choice())
    assert not chooser.serves(None)
    assert sampler.choice().takes_likeliest
    expected = [sampler.sample(row) for row in logits]
    rows = torch.arange(79, 15, -1, dtype=torch.int32)
    assert chooser.choose(torch.from_numpy(logits), rows).tolist() == expected
    assert chooser.last_tokens[rows].tolist() == expected
    logits[5, 20], logits[9, 2] = np.nan, np.inf
    found = chooser.choose(torch.from_numpy(logits), rows).tolist()
    assert [row for row, token in enumerate(found) if token == NOT_FINITE] == [5, 9]


def _view(rows: int, changes: int) -> ContextView:
    """A context of `rows` rows, each of a base of its own, from page 1 on."""
    pages = -(-max(rows, 1) // 16)
    valid = np.arange(pages * 16) < rows
    positions = np.tile(np.arange(pages * 16, dtype=np.int32), (3, 1))
    table = np.arange(1, pages + 1, dtype=np.int32)
    return ContextView(
        table, positions, valid, -np.arange(pages * 16, dtype=np.int32), (7, changes)
    )


def _row(slot: int, base: int, context: ContextView) -> SequenceInput:
    one = np.array([slot], np.int32)
    return SequenceInput(one, None, np.zeros((3, 1), np.int32), one, context, True, one * 0 + base)


def test_a_context_of_too_many_bases_is_refused() -> None:
    tables = ContextTables(rows=2, tiles=5, page_size=16, device=CPU)
    tables.take_rows([_view(4, 0)])
    tracked = tables.track(_view(4, 0))
    assert tables.add_row(tracked, _row(20, -2, _view(4, 0))) < 4  # of a base that has a tile
    assert tables.add_row(tracked, _row(21, -90, _view(4, 0))) == 4
    with pytest.raises(CapacityError, match="6 tiles"):
        tables.add_row(tracked, _row(22, -91, _view(4, 0)))


def test_a_list_is_sent_anew_only_when_it_has_to_be() -> None:
    tables = ContextTables(rows=2, tiles=32, page_size=16, device=CPU)
    staging = Staging(4096, CPU)
    tables.take_rows([_view(20, 0)])
    tracked = tables.track(_view(20, 0))
    pending = tables.send(tracked, staging)
    staging.send()
    tables.store(pending)
    sent = tables.read(torch.tensor([tracked.row]))
    (row,) = sent.rows.tolist()
    assert sent.counts[row] == 20
    assert sorted(sent.bases[row, :20].tolist()) == list(range(-19, 1))
    tables.add_row(tracked, _row(36, -20, _view(20, 0)))
    again = tables.track(_view(21, 0))
    assert again is tracked
    assert again.sent
    # rows it does not know of, or another edition
    assert not tables.track(_view(23, 0)).sent
    tracked.sent = True
    assert not tables.track(_view(23, 1)).sent


def test_a_step_keeps_the_rows_of_its_own_sequences() -> None:
    """A row holds the token chosen last, which the next step may be fed."""
    tables = ContextTables(rows=3, tiles=5, page_size=16, device=CPU)
    views = [dataclasses.replace(_view(4, 0), edition=(number, 0)) for number in range(6)]
    first = tables.take_rows(views[:3])
    assert len({*first, tables.padding_row}) == 4
    # the least recently used one, although a newcomer is listed before it
    assert tables.take_rows([views[3], views[0], views[2]]) == [first[1], first[0], first[2]]
    assert [tables.knows(view) for view in views[:4]] == [True, False, True, True]
    with pytest.raises(CapacityError, match="more than the 3 sequences"):
        tables.take_rows(views[:4])
    assert tables.take_rows([views[0]]) == [first[0]]


def test_staging_is_bounded_and_keeps_what_is_reserved() -> None:
    staging = Staging(10, CPU)
    array, reserved = staging.reserve(4)
    for step in range(3):
        staging.clear()
        array[:] = step
        values = staging.put(np.full((2, 3), -step, np.int32))
        staging.send()
        assert reserved.tolist() == [step] * 4
        assert values.tolist() == [[-step] * 3] * 2
    with pytest.raises(CapacityError, match="10 integers"):
        staging.put(np.zeros(1, np.int32))


class _Weights:
    """Tensors by name. See `framesink.runtime.executors.cuda.weight_source.WeightSource`."""

    def __init__(self, quantization: Quantization, tensors: Mapping[str, torch.Tensor]) -> None:
        self.quantization = quantization
        self._tensors = tensors

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def find(self, name: str) -> torch.Tensor | None:
        return self._tensors.get(name)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Sizes whose MLP must be padded."""
    sizes = dict(SIZES["tiny"])
    sizes["intermediate_size"] = 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "odd", sizes)
        return write_random_description("odd", tmp_path_factory.mktemp("odd"))


def _drawn(config: ModelConfig, quantization: Quantization) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, tensor in random_tensors(config, quantization).items():
        values = torch.randn(tensor.shape, generator=generator) * (tensor.deviation or 0.0)
        values += tensor.mean
        if tensor.largest is not None:
            values = values.clamp(-tensor.largest, tensor.largest)
        tensors[name] = values.to(getattr(torch, tensor.dtype))
    return tensors


def _dense(tensors: Mapping[str, torch.Tensor], name: str) -> NDArray[np.float64]:
    """A linear layer's weight as numbers."""
    weight = tensors[f"{name}.weight"].double()
    scale = tensors.get(f"{name}.weight_scale")
    return (weight if scale is None else weight * scale.double()[:, None]).numpy()


@pytest.mark.parametrize("scheme", [LinearScheme.UNQUANTIZED, LinearScheme.FP8, LinearScheme.INT8])
def test_layers_of_one_input_are_joined(config: ModelConfig, scheme: LinearScheme) -> None:
    quantization = quantize_blocks(config, scheme)
    tensors = _drawn(config, quantization)
    layer = load_language_model(_Weights(quantization, tensors), config.text, torch.float32).layers[
        1
    ]
    name = "model.layers.1"

    def numbers(linear: object) -> NDArray[np.float64]:
        weights = linear.weights  # type: ignore[attr-defined]
        values = weights.weight.double()
        if weights.scale is None:
            return values.numpy()
        # an input's code is worth its scale
        form = linear.input  # type: ignore[attr-defined]
        return (values * weights.scale.double()[:, None] / form.scale).numpy()

    expected = np.concatenate([_dense(tensors, f"{name}.self_attn.{p}_proj") for p in "qkv"])
    np.testing.assert_allclose(numbers(layer.qkv), expected, rtol=1e-6)
    biases = torch.cat([tensors[f"{name}.self_attn.{p}_proj.bias"] for p in "qkv"])
    assert torch.equal(layer.qkv.weights.bias, biases.float())
    gate, up = np.split(numbers(layer.gate_up), 2)
    inner = config.text.intermediate_size
    assert inner % INNER_MULTIPLE
    assert len(gate) % INNER_MULTIPLE == 0
    for found, part in ((gate, "gate"), (up, "up")):
        np.testing.assert_allclose(found[:inner], _dense(tensors, f"{name}.mlp.{part}_proj"))
        assert not found[inner:].any()
    down = numbers(layer.down)
    np.testing.assert_allclose(down[:, :inner], _dense(tensors, f"{name}.mlp.down_proj"))
    assert not down[:, inner:].any()


def test_layers_that_cannot_share_codes_become_numbers(config: ModelConfig) -> None:
    mixed = {
        "model.layers.0.self_attn.q_proj": LinearScheme.FP8,
        "model.layers.0.self_attn.k_proj": LinearScheme.UNQUANTIZED,
        "model.layers.0.self_attn.v_proj": LinearScheme.INT8,
    }
    quantization = Quantization(mixed)
    tensors = _drawn(config, quantization)
    # SmoothQuant's factors become part of the weight.
    factors = torch.linspace(0.5, 2.0, config.text.hidden_size)
    tensors["model.layers.0.self_attn.v_proj.pre_quant_scale"] = factors
    source = _Weights(quantization, tensors)
    qkv = load_language_model(source, config.text, torch.float32).layers[0].qkv
    assert qkv.weights.scale is None
    assert qkv.input.dtype is torch.float32
    parts = [_dense(tensors, f"model.layers.0.self_attn.{part}_proj") for part in "qkv"]
    parts[2] = parts[2] * factors.double().numpy()
    np.testing.assert_allclose(qkv.weights.weight.numpy(), np.concatenate(parts), rtol=1e-6)


def test_packed_int4_is_unpacked(config: ModelConfig) -> None:
    name, shape = "visual.blocks.0.attn.proj", (64, 64)
    quantization = Quantization({name: LinearScheme.INT4_WEIGHT_ONLY}, int4_group=16)
    tensors = _drawn(config, Quantization())
    random = np.random.default_rng(1)
    codes = random.integers(-8, 8, shape, dtype=np.int8)
    scale = random.uniform(0.01, 0.1, (64, 4)).astype(np.float32)
    tensors[f"{name}.weight"] = torch.from_numpy(pack_int4(codes))
    tensors[f"{name}.weight_scale"] = torch.from_numpy(scale)
    source = _Weights(quantization, tensors)
    found = load_vision_encoder(source, config.vision, torch.float32).blocks[0].output
    expected = codes * scale.repeat(16, axis=1)
    np.testing.assert_allclose(found.weights.weight.numpy(), expected, rtol=1e-6)
