"""The language model on the GPU: layers over paged keys and values.

Source: `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`Qwen2_5_VLTextModel`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from framesink.runtime.executors.cuda.kernels.pages import LayerPages
from framesink.runtime.executors.cuda.kernels.rotary import RotaryTable
from framesink.runtime.executors.cuda.kernels.tiles import DeviceRows, DeviceTiles, NewRows
from framesink.runtime.executors.cuda.layers import Layers, Linear
from framesink.runtime.executors.cuda.paged_cache import PagedCache
from framesink.runtime.executors.cuda.weights import DecoderLayer, LanguageModelWeights
from framesink.runtime.models.config import TextConfig

# (layer, its projected q/k/v, its pages, where the result goes)
Attend = Callable[[Linear, Tensor, LayerPages, Tensor], None]


@dataclass(frozen=True, slots=True, eq=False)
class PackedParts:
    """Parts of prompts, one after another: `starts` int32 `[B + 1]` says where each begins,
    `longest` is the largest part, `last` int64 `[n]` the tokens whose logits are wanted, counted
    from the first of the step."""

    starts: Tensor
    longest: int
    last: Tensor


class LanguageModel:
    """Runs decode steps and parts of prompts over paged keys and values."""

    def __init__(
        self,
        config: TextConfig,
        weights: LanguageModelWeights,
        layers: Layers,
        rotary: RotaryTable,
        cache: PagedCache,
    ) -> None:
        self._config = config
        self._weights = weights
        self._layers = layers
        self._rotary = rotary
        self._cache = cache

    @property
    def embedding(self) -> Tensor:
        """The embeddings of all tokens `[vocab, hidden]`."""
        return self._weights.embedding

    def decode(self, hidden: Tensor, rows: NewRows, tiles: DeviceTiles) -> Tensor:
        """One token of each of B sequences: logits `[B, vocab]`, in the compute type.

        `hidden` `[B, hidden]` are the tokens' embeddings, which are overwritten; `tiles` are the
        contexts with the new rows in them.
        """
        operations = self._layers.operations

        def attend(output: Linear, qkv: Tensor, pages: LayerPages, mixed: Tensor) -> None:
            operations.paged_decode(qkv, self._rotary, rows, tiles, pages, mixed, output.input)

        hidden, delta = self._run(hidden, attend)
        return self._logits(hidden, delta)

    def prefill(
        self,
        hidden: Tensor,
        rows: NewRows,
        parts: PackedParts,
        context: DeviceRows,
        tiles: DeviceTiles | None = None,
    ) -> Tensor:
        """Parts of prompts: logits `[n, vocab]` of the tokens `parts.last`, in the compute type.

        `hidden` `[m, hidden]` are the tokens' embeddings, which are overwritten; `context` are the
        rows before them. With `tiles` the first tokens are one of each of B other sequences, as
        `decode` takes them: so both read the weights together.
        """
        operations = self._layers.operations
        single = 0 if tiles is None else len(tiles.rows)
        decodes, prompts = rows.part(slice(single)), rows.part(slice(single, None))

        def attend(output: Linear, qkv: Tensor, pages: LayerPages, mixed: Tensor) -> None:
            if tiles is not None:
                operations.paged_decode(
                    qkv[:single],
                    self._rotary,
                    decodes,
                    tiles,
                    pages,
                    mixed[:single],
                    output.input,
                )
            operations.rotate_and_append(qkv[single:], self._rotary, prompts, pages)
            operations.paged_prefill(
                qkv[single:],
                self._rotary,
                parts.starts,
                parts.longest,
                context,
                pages,
                mixed[single:],
                output.input,
            )

        hidden, delta = self._run(hidden, attend)
        return self._logits(hidden[parts.last], delta[parts.last])

    def _run(self, hidden: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """All layers; the last one's result is left to be added to `hidden`."""
        delta: Tensor | None = None
        for layer, pages in zip(self._weights.layers, self._cache.layers, strict=True):
            delta = self._layer(layer, hidden, delta, pages, attend)
        assert delta is not None
        return hidden, delta

    def _layer(
        self,
        layer: DecoderLayer,
        hidden: Tensor,
        delta: Tensor | None,
        pages: LayerPages,
        attend: Attend,
    ) -> Tensor:
        layers, config = self._layers, self._config
        epsilon = config.rms_norm_eps
        inputs = layers.rms_norm(hidden, layer.input_norm, epsilon, layer.qkv, delta)
        width = config.num_attention_heads * config.head_dim
        mixed = layers.form((len(hidden), width), layer.output, hidden.device)
        attend(layer.output, layers.linear(inputs, layer.qkv), pages, mixed)
        delta = layers.linear(mixed, layer.output)
        inputs = layers.rms_norm(hidden, layer.post_attention_norm, epsilon, layer.gate_up, delta)
        return layers.gated_mlp(inputs, layer.gate_up, layer.down)

    def _logits(self, hidden: Tensor, delta: Tensor) -> Tensor:
        weights, layers = self._weights, self._layers
        head = weights.head
        inputs = layers.rms_norm(hidden, weights.final_norm, self._config.rms_norm_eps, head, delta)
        return layers.linear(inputs, head)
