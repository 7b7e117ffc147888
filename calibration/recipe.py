"""A recipe: the small readable file that says what of a checkpoint is quantized, and how.

language_model = "int8"
head = "int8"
vision_encoder = "fp8"
kv_cache = "int8"
smoothquant_alpha = "search"

[overrides]
"model.layers.3.mlp.down_proj" = "fp16"
"visual.blocks.*.attn.qkv" = "int8-weight-only"
"""

import json
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from framesink.runtime.errors import OptionError, OutputError
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.models.quantization import (
    CacheScheme,
    LinearScheme,
    Quantization,
    quantizable_linears,
    suits_int4,
)
from framesink.runtime.models.weights import LM_HEAD, MERGER

LinearPrecision = Literal["fp16", "fp8", "int8", "int8-weight-only", "int4-weight-only"]
CachePrecision = Literal["fp16", "int8", "fp8"]
Alpha = Annotated[float, Field(ge=0.0, le=1.0)] | Literal["search"]

# What people write, and the schemes it stands for; "fp16" means: as the checkpoint has it.
LINEAR_SCHEMES: Mapping[LinearPrecision, LinearScheme] = {
    "fp16": LinearScheme.UNQUANTIZED,
    "fp8": LinearScheme.FP8,
    "int8": LinearScheme.INT8,
    "int8-weight-only": LinearScheme.INT8_WEIGHT_ONLY,
    "int4-weight-only": LinearScheme.INT4_WEIGHT_ONLY,
}
CACHE_SCHEMES: Mapping[CachePrecision, CacheScheme] = {
    "fp16": CacheScheme.UNQUANTIZED,
    "int8": CacheScheme.INT8,
    "fp8": CacheScheme.FP8,
}
_MAX_BYTES = 1_000_000
_HEAD = LM_HEAD.removesuffix(".weight")
_SETTINGS = ("language_model", "head", "vision_encoder", "kv_cache", "smoothquant_alpha")


class Recipe(BaseModel):
    """A precision per part, and overrides for linear layers.

    `overrides` goes by canonical names without `.weight`, in which `*`, `?` and `[…]` match as in
    file names; of several that match a layer the last one counts. `head` is the projection to the
    vocabulary, lm_head; the vision merger is quantized only where an override says so.
    `smoothquant_alpha` moves the difficulty of INT8
    W8A8 from the inputs (0: none of it) to the weights (1: all); "search" picks it per block. On
    held-out video the demo model's KL against 16-bit is 3.6e-6 nats with "search", 2.9e-6 with the
    best single α (0.2), 2.4e-5 with 0.5, and about 5e-2 with 1.0, which is ModelOpt's default and
    leaves no channel any headroom.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    language_model: LinearPrecision = "fp16"
    head: LinearPrecision = "fp16"
    vision_encoder: LinearPrecision = "fp16"
    kv_cache: CachePrecision = "fp16"
    smoothquant_alpha: Alpha = "search"
    overrides: dict[str, LinearPrecision] = {}

    def precisions(self, config: ModelConfig) -> dict[str, LinearPrecision]:
        """What the recipe asks for each linear layer of a model.

        Raises OptionError for an override that matches none, and for a head that is to be
        quantized and cannot be.
        """
        linears = quantizable_linears(config)
        if self.head != "fp16" and _HEAD not in linears:
            raise OptionError(
                f"The head of this model is its embedding's table, which stays in 16 bits, so it "
                f"cannot be {self.head}; leave out --head-precision, or head in the recipe."
            )
        asked = {name: self._default(name) for name in linears}
        for pattern, precision in self.overrides.items():
            matching = [name for name in linears if fnmatchcase(name, pattern)]
            if not matching:
                raise OptionError(
                    f"The recipe's override {pattern!r} matches no linear layer of this model; "
                    "layers are called like model.layers.0.mlp.down_proj or "
                    "visual.blocks.0.attn.qkv."
                )
            asked |= dict.fromkeys(matching, precision)
        return asked

    def resolve(self, config: ModelConfig) -> Quantization:
        """The scheme of each layer of a model.

        INT4 becomes INT8 weight-only where a layer's inputs are no whole number of groups. Raises
        OptionError as `precisions` does.
        """
        linears = quantizable_linears(config)
        schemes = {}
        for name, precision in self.precisions(config).items():
            scheme = LINEAR_SCHEMES[precision]
            if scheme is LinearScheme.INT4_WEIGHT_ONLY and not suits_int4(linears[name]):
                scheme = LinearScheme.INT8_WEIGHT_ONLY
            if scheme is not LinearScheme.UNQUANTIZED:
                schemes[name] = scheme
        return Quantization(linears=schemes, cache=CACHE_SCHEMES[self.kv_cache])

    def write(self, path: Path) -> None:
        """Write the recipe as TOML. Raises OutputError if the file cannot be written."""
        lines = [f"{name} = {json.dumps(getattr(self, name))}" for name in _SETTINGS]
        if self.overrides:
            lines += ["", "[overrides]"]
            # A JSON string of printable characters is a TOML string.
            lines += [
                f"{json.dumps(pattern, ensure_ascii=False)} = {json.dumps(precision)}"
                for pattern, precision in self.overrides.items()
            ]
        try:
            path.write_text("\n".join(lines) + "\n")
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a recipe. Raises OptionError if it is missing, malformed, or names an unknown
        setting or precision."""
        try:
            with path.open("rb") as file:
                content: dict[str, Any] = tomllib.loads(file.read(_MAX_BYTES).decode())
            return cls.model_validate(content)
        except OSError as error:
            raise OptionError(f"Cannot read {path}: {error.strerror or error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part)[:64] for part in first["loc"])
            raise OptionError(f"The recipe {path} is wrong at {place}: {first['msg']}.") from error
        except (ValueError, RecursionError) as error:
            raise OptionError(f"The recipe {path} is not valid TOML: {error}.") from error

    def _default(self, linear: str) -> LinearPrecision:
        if linear == _HEAD:
            return self.head
        if linear.startswith(f"{MERGER}."):
            return "fp16"
        return self.vision_encoder if linear.startswith("visual.") else self.language_model
