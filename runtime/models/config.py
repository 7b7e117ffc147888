"""Sizes of a Qwen2.5-VL checkpoint, as the engine needs them.

Field names are those of the checkpoint's `config.json` wherever it has one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framesink.runtime.errors import CheckpointError

SUPPORTED_MODEL_TYPES = ("qwen2_5_vl",)
VISION_ROPE_THETA = 10_000.0
MAX_SIZE = 1 << 24
MAX_LAYERS = 1024


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


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """The sizes in a checkpoint's `config.json`.

    Both layouts are read: the flat one of transformers 4 (and of the published checkpoints) and the
    nested one of transformers 5 (`text_config`, `rope_parameters`). Raises CheckpointError for an
    unknown architecture, a variant that the graphs do not implement, and a missing, mistyped or
    inconsistent field.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            f"The checkpoint's architecture is {str(model_type)[:64]!r}, which is not supported; "
            f"supported is {', '.join(SUPPORTED_MODEL_TYPES)} (Qwen2.5-VL)."
        )
    root = _Section("", config)
    text_fields = {**config, **root.mapping("text_config", default={})}
    return ModelConfig(
        model_type=str(model_type),
        text=_parse_text(_Section("", text_fields), root),
        vision=_parse_vision(_Section("vision_config.", root.mapping("vision_config"))),
        video_token_id=root.size("video_token_id", minimum=0),
        vision_start_token_id=root.size("vision_start_token_id", minimum=0),
        vision_end_token_id=root.size("vision_end_token_id", minimum=0),
    )


def _parse_text(text: "_Section", root: "_Section") -> TextConfig:
    text.require("hidden_act", "silu")
    text.require("use_sliding_window", False)
    hidden_size = text.size("hidden_size")
    heads = text.size("num_attention_heads")
    key_value_heads = text.size("num_key_value_heads", default=heads)
    if hidden_size % heads or heads % key_value_heads:
        raise CheckpointError(
            f"config.json does not fit together: {heads} attention heads over hidden_size "
            f"{hidden_size} with {key_value_heads} key/value heads."
        )
    head_dim = hidden_size // heads
    rope_key = "rope_parameters" if text.has("rope_parameters") else "rope_scaling"
    rope = _Section(f"{rope_key}.", text.mapping(rope_key))
    rope_type = rope.raw("rope_type", rope.raw("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise CheckpointError(
            f"config.json asks for rotary embeddings of type {str(rope_type)[:64]!r}; only plain "
            "M-RoPE is supported."
        )
    sections = rope.sizes("mrope_section", minimum=0)
    if len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"{rope_key}.mrope_section in config.json is {list(sections)}; it must be three counts "
            f"that sum to half the head dimension, {head_dim / 2:g}."
        )
    tied = text.flag("tie_word_embeddings", default=False)
    return TextConfig(
        vocab_size=text.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=text.size("intermediate_size"),
        num_hidden_layers=text.size("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", default=1e-5),
        rope_theta=(rope if rope.has("rope_theta") else text).number("rope_theta", default=1e6),
        mrope_section=(sections[0], sections[1], sections[2]),
        max_position_embeddings=text.size(
            "max_position_embeddings", default=32768, maximum=1 << 40
        ),
        tie_word_embeddings=tied or root.flag("tie_word_embeddings", default=False),
    )


def _parse_vision(vision: "_Section") -> VisionConfig:
    vision.require("hidden_act", "silu")
    rope = _Section("vision_config.rope_parameters.", vision.mapping("rope_parameters", default={}))
    rope.require("rope_type", "axial")
    rope.require("rope_theta", VISION_ROPE_THETA)
    depth = vision.size("depth", maximum=MAX_LAYERS)
    config = VisionConfig(
        depth=depth,
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        num_heads=vision.size("num_heads"),
        out_hidden_size=vision.size("out_hidden_size"),
        patch_size=vision.size("patch_size", default=14),
        spatial_merge_size=vision.size("spatial_merge_size", default=2),
        temporal_patch_size=vision.size("temporal_patch_size", default=2),
        in_channels=vision.size("in_channels", default=vision.size("in_chans", default=3)),
        window_size=vision.size("window_size", default=112),
        fullatt_block_indexes=vision.sizes("fullatt_block_indexes", minimum=0),
        tokens_per_second=vision.number("tokens_per_second", default=4.0),
    )
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise CheckpointError(
            f"vision_config does not fit together: {config.num_heads} heads over hidden_size "
            f"{config.hidden_size}; the head dimension must be a multiple of 4."
        )
    if config.window_size < config.patch_size * config.spatial_merge_size:
        raise CheckpointError(
            f"vision_config.window_size is {config.window_size} pixels, smaller than one merged "
            f"patch of {config.patch_size * config.spatial_merge_size}."
        )
    if any(index >= depth for index in config.fullatt_block_indexes):
        raise CheckpointError(
            f"vision_config.fullatt_block_indexes names a block beyond its {depth} blocks."
        )
    return config


class _Section:
    """One JSON object of `config.json`; reads typed fields and names them in errors.

    A field that is `null` counts as absent, as in transformers.
    """

    def __init__(self, prefix: str, fields: Mapping[str, Any]) -> None:
        self._prefix = prefix
        self._fields = fields

    def raw(self, name: str, default: Any = None) -> Any:
        value = self._fields.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def require(self, name: str, expected: object) -> None:
        """The field must be absent or have the one value the graphs implement."""
        value = self.raw(name, expected)
        if value != expected:
            raise CheckpointError(
                f"{self._prefix}{name} in config.json is {str(value)[:64]!r}; only {expected!r} is "
                "supported."
            )

    def mapping(self, name: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        value = self.raw(name, default)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw(name, default)
        if not _is_number(value) or not (0 < value < math.inf):
            raise self._wrong(name, "a positive number")
        return float(value)

    def size(
        self,
        name: str,
        default: int | None = None,
        *,
        minimum: int = 1,
        maximum: int = MAX_SIZE,
    ) -> int:
        value = self.raw(name, default)
        if not _is_size(value, minimum, maximum):
            raise self._wrong(name, f"an integer from {minimum} to {maximum}")
        return int(value)

    def sizes(self, name: str, *, minimum: int = 1) -> tuple[int, ...]:
        value = self.raw(name)
        if not isinstance(value, list) or not all(_is_size(v, minimum, MAX_SIZE) for v in value):
            raise self._wrong(name, f"a list of integers from {minimum} to {MAX_SIZE}")
        return tuple(value)

    def _wrong(self, name: str, wanted: str) -> CheckpointError:
        found = f"is {str(self._fields[name])[:64]!r}" if self.has(name) else "is missing"
        return CheckpointError(f"{self._prefix}{name} in config.json {found}; it must be {wanted}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: object, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum
