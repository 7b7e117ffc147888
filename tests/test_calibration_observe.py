"""What calibration records, against hooks on transformers' modules in one dense forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference.dense_policies import DenseFullAttention
from reference.scenario import NUM_PAGES, Scenario

from framesink.runtime.arrays import Float32Array
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.manifest import Limits, StreamingDefaults
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import quantizable_linears
from framesink.runtime.models.weights import canonical_name
from framesink.runtime.preprocess import Grid, PreprocessConfig
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="calibration runs in torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from framesink.calibration.collector import StatisticsCollector  # noqa: E402
from framesink.calibration.formats import INT8  # noqa: E402
from framesink.calibration.observers import Observer  # noqa: E402
from framesink.calibration.recorded_turns import StreamSettings  # noqa: E402
from framesink.calibration.statistics import Statistics  # noqa: E402
from framesink.calibration.torch_executor import TorchExecutor  # noqa: E402

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

CHUNKS = 5
PATCH_EMBED = "visual.patch_embed.proj"
STREAM = Scenario(
    policy=DenseFullAttention(),
    query="What happens?",
    sizes={0: (56, 84), 2: (112, 112), 4: (56, 56)},
    max_new_tokens=6,
)
# transformers computes norms and softmax in float32 whatever the weights are.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


@dataclass
class Shown:
    """All that an executor was given: frames, and tokens in the order they were written."""

    patches: list[Float32Array] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[tuple[int, ...]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)


class _Listening(TorchExecutor):
    """A TorchExecutor that notes what it is given."""

    def __init__(self, checkpoint: Checkpoint, shown: Shown, collector: StatisticsCollector):
        super().__init__(checkpoint, num_pages=NUM_PAGES, taps=collector)
        self._shown = shown

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        self._shown.patches.append(patches)
        self._shown.grids.append(grid)
        return super().encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        for sequence in batch:
            self._shown.tokens += sequence.token_ids.tolist()
            self._shown.positions += [tuple(place) for place in sequence.positions.T.tolist()]
            if sequence.needs_logits:
                self._shown.asked.append(len(self._shown.tokens) - 1)
        return super().step(batch)


def _settings(directory: Path, checkpoint: Checkpoint) -> StreamSettings:
    return StreamSettings(
        checkpoint.config,
        ChatProtocol(Tokenizer.from_directory(directory)),
        PreprocessConfig(min_pixels=56 * 56, max_pixels=112 * 112),
        StreamingDefaults(),
        Limits(max_streams=1, max_context=4096, max_prefill=64, max_patches=256),
    )


@dataclass
class Seen:
    """What hooks saw in one dense forward: inputs `[n, in]` and outputs `[n, out]` of every linear
    layer, by canonical name."""

    inputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    outputs: dict[str, NDArray[Any]] = field(default_factory=dict)

    @contextmanager
    def hooked(self, model: "Qwen2_5_VLForConditionalGeneration") -> Iterator[None]:
        def hook_of(name: str) -> Any:
            def hook(_module: Any, inputs: Any, output: Any) -> None:
                (value,) = inputs
                rows = value.flatten(1) if name == PATCH_EMBED else value.flatten(0, -2)
                self.inputs[name] = rows.numpy()
                self.outputs[name] = output.flatten(0, -2).numpy()

            return hook

        kinds = (torch.nn.Linear, torch.nn.Conv3d)
        handles = [
            module.register_forward_hook(hook_of(canonical_name(name)))
            for name, module in model.named_modules()
            if isinstance(module, kinds)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@pytest.fixture(scope="module")
def observed(tiny_checkpoint: Path) -> tuple[Statistics, Shown]:
    """A stream without eviction, as calibration sees it."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    shown, collector = Shown(), StatisticsCollector()
    executor = _Listening(checkpoint, shown, collector)
    with _settings(tiny_checkpoint, checkpoint).engine(executor) as engine:
        session = STREAM.open_session(engine)
        for number in range(CHUNKS):
            session.push_chunk(STREAM.chunk(number))
            list(session)
    # No token was written twice: the rows are those of one dense forward.
    assert len(set(shown.positions)) == len(shown.positions)
    return collector.statistics(checkpoint="", source="test", chunks=CHUNKS), shown


@pytest.fixture(scope="module")
def seen(
    observed: tuple[Statistics, Shown], tiny_model: "Qwen2_5_VLForConditionalGeneration"
) -> Seen:
    """The same tokens and frames in one dense forward of transformers."""
    _, shown = observed
    ids = torch.tensor([shown.tokens])
    grids = [[grid.t, grid.h, grid.w] for grid in shown.grids]
    seen = Seen()
    with seen.hooked(tiny_model), torch.no_grad():
        tiny_model(
            input_ids=ids,
            pixel_values_videos=torch.from_numpy(np.concatenate(shown.patches)).double(),
            video_grid_thw=torch.tensor(grids),
            second_per_grid_ts=torch.ones(len(grids)),
            mm_token_type_ids=2 * (ids == tiny_model.config.video_token_id).int(),
        )
    # Calibration computes logits for the last token of a prompt or step alone.
    seen.inputs["lm_head"] = seen.inputs["lm_head"][shown.asked]
    return seen


def test_every_linear_layer_is_observed(
    observed: tuple[Statistics, Shown], seen: Seen, tiny_checkpoint: Path
) -> None:
    names = set(observed[0].linears)
    assert names == set(seen.inputs)
    assert names >= set(quantizable_linears(Checkpoint.open(tiny_checkpoint).config))


def test_inputs_are_those_that_hooks_see(observed: tuple[Statistics, Shown], seen: Seen) -> None:
    statistics, _ = observed
    for name, values in seen.inputs.items():
        linear = statistics.linears[name]
        assert linear.rows == len(values), name
        np.testing.assert_allclose(linear.channels.minimum, values.min(0), **TOLERANCE)
        np.testing.assert_allclose(linear.channels.maximum, values.max(0), **TOLERANCE)
        np.testing.assert_allclose(linear.amax, np.abs(values).max(0), **TOLERANCE)
        np.testing.assert_allclose(linear.mean_square, np.square(values).mean(0), **TOLERANCE)
        assert statistics.input_amax(name, Observer.ABSMAX, INT8) == pytest.approx(
            np.abs(values).max(), rel=1e-3
        )
        histogram = linear.histogram
        assert histogram.counts.sum() == values.size
        width = histogram.limit / len(histogram.counts)
        percentile = statistics.input_amax(name, Observer.PERCENTILE, INT8)
        below = np.percentile(np.abs(values), 99.99, method="lower")
        above = np.percentile(np.abs(values), 99.99, method="higher")
        assert below - 2 * width <= percentile <= above + 2 * width, name


def test_keys_and_values_are_those_that_hooks_see(
    observed: tuple[Statistics, Shown],
    seen: Seen,
    tiny_model: "Qwen2_5_VLForConditionalGeneration",
) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

    statistics, shown = observed
    text = tiny_model.model.language_model
    positions = torch.tensor(shown.positions).T[:, None]
    cosine, sine = text.rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
    for index, layer in enumerate(statistics.layers):
        name = f"model.layers.{index}.self_attn"
        attention = text.layers[index].self_attn
        shape = (len(shown.tokens), -1, attention.head_dim)
        biased = seen.outputs[f"{name}.k_proj"].reshape(shape)
        bias = attention.k_proj.bias.detach().numpy().reshape(shape[1:])
        keys = biased - bias
        flat = keys.reshape(len(keys), -1)
        assert layer.rows == len(keys)
        np.testing.assert_allclose(layer.keys.minimum, flat.min(0), **TOLERANCE)
        np.testing.assert_allclose(layer.keys.maximum, flat.max(0), **TOLERANCE)
        np.testing.assert_allclose(layer.key_channel_amax, np.abs(flat).max(0), **TOLERANCE)

        half = attention.head_dim // 2
        norms = np.abs(keys[..., :half] + 1j * keys[..., half:]).max(0).reshape(-1)
        np.testing.assert_allclose(layer.key_pair_amax, norms, **TOLERANCE)

        heads = torch.from_numpy(biased).transpose(0, 1)[None]
        rotated, _ = apply_rotary_pos_emb(heads, heads, cosine, sine)
        assert layer.rotated_key_amax == pytest.approx(float(rotated.abs().max()), rel=1e-3)

        values = seen.outputs[f"{name}.v_proj"].reshape(shape)
        expected = np.abs(values).max(axis=(0, 2))
        np.testing.assert_allclose(layer.value_head_amax, expected, **TOLERANCE)
        assert layer.value_amax == pytest.approx(expected.max(), rel=1e-3)
