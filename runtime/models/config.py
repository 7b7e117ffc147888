"""Sizes of a Qwen2.5-VL checkpoint, as the engine needs them.

Field names are those of the checkpoint's `config.json` wherever it has one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model. `mrope_section` counts rotary pairs for the t, h and w axes and sums to
    `head_dim / 2`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision encoder. `window_size` is in pixels; blocks listed in `fullatt_block_indexes`
    attend within a whole temporal grid step, all others within windows."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    in_channels: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    tokens_per_second: float
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches merged into one language-model token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint: both parts and the token ids that join them."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
