"""Qwen2.5-VL with a dense cache of keys before RoPE, made of transformers' own modules.

Every forward rotates all cached keys afresh with the positions it is given and attends with a plain
softmax over right-aligned queries, as StreamingVLM does
(`streaming_vlm/inference/qwen2_5/language_forward.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, repeat_kv

from reference.positions import GridSize, Position


def load_model(
    checkpoint: Path, dtype: torch.dtype = torch.float64
) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint in transformers, with plain attention, for evaluation in `dtype`."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


class DenseModel:
    """The model and one stream's cache: per layer, keys (with bias, before RoPE) and values
    `[kv_heads, rows, head_dim]`."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        self.model = model
        self.text = model.model.language_model
        self.dtype = model.dtype
        empty = torch.zeros(
            model.config.text_config.num_key_value_heads,
            0,
            self.text.layers[0].self_attn.head_dim,
            dtype=self.dtype,
        )
        self.keys: list[Tensor] = [empty] * len(self.text.layers)
        self.values: list[Tensor] = [empty] * len(self.text.layers)

    @property
    def rows(self) -> int:
        """Cached rows."""
        return len(self.keys[0][0])

    def select(self, rows: Sequence[int]) -> None:
        """Keep the given rows, in the given order; this drops, moves and cuts."""
        index = torch.tensor(rows, dtype=torch.long)
        self.keys = [torch.index_select(key, 1, index) for key in self.keys]
        self.values = [torch.index_select(value, 1, index) for value in self.values]

    @torch.no_grad()
    def encode_vision(self, patches: Tensor, grid: GridSize) -> Tensor:
        """Patches `[t·h·w, patch_dim]` to embeddings `[t·h·w / merge², hidden]`."""
        output = self.model.model.get_video_features(patches.to(self.dtype), torch.tensor([grid]))
        (embeddings,) = output.pooler_output
        return embeddings

    @torch.no_grad()
    def forward(
        self, ids: Sequence[int], vision: Tensor | None, positions: Sequence[Position]
    ) -> Tensor:
        """Append `ids` to the cache and return the logits `[vocab]` of the last of them.

        `vision` `[v, hidden]` replaces the embeddings of the video placeholders among `ids`.
        `positions` are those of all cached rows and of `ids` after them.
        """
        hidden = self.text.embed_tokens(torch.tensor(ids))
        if vision is not None:
            hidden[torch.tensor(ids) == self.model.config.video_token_id] = vision
        hidden = hidden[None]
        axes = torch.tensor(positions).T[:, None]
        cosine, sine = self.text.rotary_emb(hidden, axes)
        for index, layer in enumerate(self.text.layers):
            attended = self._attend(index, layer.input_layernorm(hidden), cosine, sine)
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.text.norm(hidden[:, -1]))[0]

    def _attend(self, index: int, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        attention = self.text.layers[index].self_attn
        new = hidden.shape[1]

        def heads(projected: Tensor) -> Tensor:
            return projected[0].view(new, -1, attention.head_dim).transpose(0, 1)

        self.keys[index] = torch.cat([self.keys[index], heads(attention.k_proj(hidden))], dim=1)
        self.values[index] = torch.cat([self.values[index], heads(attention.v_proj(hidden))], dim=1)
        query = heads(attention.q_proj(hidden))[None]
        key, value = self.keys[index][None], self.values[index][None]
        total = key.shape[2]
        query, _ = apply_rotary_pos_emb(query, query, cosine[:, -new:], sine[:, -new:])
        key, _ = apply_rotary_pos_emb(key, key, cosine, sine)
        key = repeat_kv(key, attention.num_key_value_groups)
        value = repeat_kv(value, attention.num_key_value_groups)
        scores = query @ key.transpose(2, 3) * attention.scaling
        future = torch.ones(new, total, dtype=torch.bool).triu(total - new + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(1, new, -1)
        return attention.o_proj(mixed)
