"""An executor in torch, for calibration: every layer can be watched, and calculated otherwise.

Source: `transformers` `models/qwen2_5_vl/modeling_qwen2_5_vl.py` (`Qwen2_5_VLTextModel`). Keys are
stored before RoPE and without the projection's bias, values with theirs, as in the authored graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from framesink.calibration.taps import Numerics, PlainNumerics, Rotary, Taps
from framesink.calibration.torch_layers import TorchLayers, attend, rotate
from framesink.calibration.torch_vision import TorchVisionEncoder
from framesink.calibration.torch_weights import TorchWeights
from framesink.runtime.arrays import Float32Array, Int32Array
from framesink.runtime.errors import CapacityError, CheckpointError
from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.weights import EMBEDDING, FINAL_NORM, layer_name, output_projection
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import MRopeTable

DEFAULT_PAGE_SIZE = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The slots int64 that a step reads and those it writes, with the rotary tables of either."""

    read: Tensor
    rotary_read: Rotary
    written: Tensor
    rotary_written: Rotary


class TorchExecutor:
    """Runs a checkpoint without a graph, one sequence after another. See
    `framesink.runtime.executors.base.Executor`."""

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        num_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        taps: Taps | None = None,
        numerics: Numerics | None = None,
    ) -> None:
        """`dtype` is that of weights, activations and pages; `taps` watch, `numerics` calculate.

        Raises CheckpointError for a quantized checkpoint, CapacityError if the pages do not fit
        into memory.
        """
        if checkpoint.quantization is not None:
            raise CheckpointError(
                f"{checkpoint.directory} is quantized, and torch runs 16-bit checkpoints alone."
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._config = checkpoint.config
        self._device = torch.device(device)
        self._dtype = dtype
        self._weights = TorchWeights(checkpoint, dtype, self._device)
        self._taps = taps
        self._numerics = numerics or PlainNumerics()
        self._layers = TorchLayers(self._weights, taps, self._numerics)
        self._vision = TorchVisionEncoder(
            checkpoint.config.vision, self._layers, dtype, self._device
        )
        self._rope = MRopeTable(checkpoint.config.text, "float32")
        self._pools = self._allocate_pools()

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings float32 `[t·h·w / merge², hidden]`."""
        with torch.no_grad():
            embeddings = self._vision.encode(self._to_device(patches), grid)
            return _to_host(embeddings)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Run the sequences one after another; see `Executor.step`."""
        with torch.no_grad():
            return [self._run(sequence) for sequence in batch]

    def close(self) -> None:
        """Free weights and pages."""
        self._weights.close()
        self._pools.clear()

    def _run(self, sequence: SequenceInput) -> Float32Array | None:
        read, rotary_context = self._context(sequence.context)
        rows = _Rows(
            read=read,
            rotary_read=rotary_context,
            written=torch.from_numpy(sequence.slots).to(self._device, torch.int64),
            rotary_written=self._rotary(sequence.positions),
        )
        hidden = self._embed(sequence)
        for index in range(self._config.text.num_hidden_layers):
            hidden = self._decoder_layer(index, hidden, rows)
        return self._logits(hidden[-1:]) if sequence.needs_logits else None

    def _decoder_layer(self, index: int, hidden: Tensor, rows: _Rows) -> Tensor:
        name, epsilon = layer_name(index), self._config.text.rms_norm_eps
        inputs = self._layers.rms_norm(f"{name}.input_layernorm", hidden, epsilon)
        hidden = hidden + self._self_attention(index, inputs, rows)
        inputs = self._layers.rms_norm(f"{name}.post_attention_layernorm", hidden, epsilon)
        return hidden + self._layers.gated_mlp(f"{name}.mlp", inputs, bias=False)

    def _self_attention(self, index: int, inputs: Tensor, rows: _Rows) -> Tensor:
        name = f"{layer_name(index)}.self_attn"
        queries = self._heads(self._layers.linear(f"{name}.q_proj", inputs))
        keys = self._heads(self._layers.linear(f"{name}.k_proj", inputs, bias=False))
        values = self._heads(self._layers.linear(f"{name}.v_proj", inputs))
        bias = self._weights.get(f"{name}.k_proj.bias").view(keys.shape[1:])
        if self._taps is not None:
            self._taps.keys(index, keys, rotate(keys + bias, rows.rotary_written))
            self._taps.values(index, values)
        # New rows pass through the cache before they are attended to, as in the graph.
        keys = self._numerics.stored_keys(index, keys, bias, rows.rotary_written)
        values = self._numerics.stored_values(index, values)
        key_pool, value_pool = self._pools[index]
        older = rotate(key_pool[rows.read] + bias, rows.rotary_read)
        newer = rotate(keys + bias, rows.rotary_written)
        mixed = attend(
            rotate(queries, rows.rotary_written),
            torch.cat([older, newer]),
            torch.cat([value_pool[rows.read], values]),
        )
        key_pool[rows.written], value_pool[rows.written] = keys, values
        return self._layers.linear(f"{name}.o_proj", mixed.flatten(1), bias=False)

    def _context(self, context: ContextView) -> tuple[Tensor, Rotary]:
        """The slots of a context's rows, and the rotary tables of their positions."""
        table = torch.from_numpy(context.block_table).to(torch.int64)
        slots = table[:, None] * self.page_size + torch.arange(self.page_size)
        valid = torch.from_numpy(context.valid)
        positions = context.positions[:, context.valid]
        return slots.flatten()[valid].to(self._device), self._rotary(positions)

    def _rotary(self, positions: Int32Array) -> Rotary:
        cos, sin = self._rope.lookup(positions)
        return self._to_device(cos), self._to_device(sin)

    def _embed(self, sequence: SequenceInput) -> Tensor:
        """Embeddings `[s, hidden]` of the new tokens, vision embeddings in their places."""
        ids = torch.from_numpy(sequence.token_ids).to(torch.int64)
        hidden = self._weights.rows(EMBEDDING, ids)
        if sequence.vision_embeddings is not None:
            places = (ids == self._config.video_token_id).to(self._device)
            hidden[places] = self._to_device(sequence.vision_embeddings)
        return hidden

    def _logits(self, hidden: Tensor) -> Float32Array:
        """Logits `[vocab]` of one token's state `[1, hidden]`."""
        text = self._config.text
        normed = self._layers.rms_norm(
            FINAL_NORM.removesuffix(".weight"), hidden, text.rms_norm_eps
        )
        projection = output_projection(text).removesuffix(".weight")
        return _to_host(self._layers.linear(projection, normed, bias=False)[0])

    def _heads(self, projected: Tensor) -> Tensor:
        """`[n, heads·D]` to `[n, heads, D]`."""
        return projected.unflatten(1, (-1, self._config.text.head_dim))

    def _to_device(self, values: Float32Array) -> Tensor:
        return torch.from_numpy(values).to(self._device, self._dtype)

    def _allocate_pools(self) -> list[tuple[Tensor, Tensor]]:
        """Zeroed rows `[N·page, Hkv, D]` of every layer's keys and values."""
        text = self._config.text
        shape = (self.num_pages * self.page_size, text.num_key_value_heads, text.head_dim)
        needed = 2 * text.num_hidden_layers * torch.Size(shape).numel() * self._dtype.itemsize
        if self._device.type == "cuda":
            available = torch.cuda.mem_get_info(self._device)[0]
        else:
            available = psutil.virtual_memory().available
        if needed > available:
            raise CapacityError(
                f"{self.num_pages} pages need {needed / 1e9:.1f} GB of memory and "
                f"{available / 1e9:.1f} GB are available; ask for a shorter context."
            )
        return [
            (
                torch.zeros(shape, dtype=self._dtype, device=self._device),
                torch.zeros(shape, dtype=self._dtype, device=self._device),
            )
            for _ in range(text.num_hidden_layers)
        ]


def _to_host(values: Tensor) -> Float32Array:
    array: Float32Array = values.float().cpu().numpy()
    return array
