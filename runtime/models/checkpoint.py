"""A Hugging Face checkpoint directory, opened lazily: sizes and tensor places, no weights read.

A quantized checkpoint's scales are read, since every one of them must be a number greater than 0.

Only safetensors and JSON are read; nothing is unpickled and no code of the checkpoint is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.config import ModelConfig, parse_config
from framesink.runtime.models.quantization import (
    QUANTIZATION_NAME,
    Quantization,
    TensorRule,
    read_quantization,
    tensor_rules,
)
from framesink.runtime.models.safetensors import (
    TensorInfo,
    parse_json_object,
    read_header,
    read_tensor,
)
from framesink.runtime.models.weights import canonical_name, model_weights

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 64_000_000
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A scale below or above would be 0 or infinite in float16.
MIN_SCALE = 2.0**-24
MAX_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint whose weights are all there, with the shapes its config implies.

    Tensors go by their canonical names (`framesink.runtime.models.weights`), however the files
    call them. `quantization` is None for a plain checkpoint.
    """

    directory: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    quantization: Quantization | None = None

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Read `config.json`, the headers of the safetensors files and, if the checkpoint is
        quantized, its description and scales.

        Raises CheckpointError, in one sentence, for a directory, config, description or weight file
        that is missing or damaged, an unknown architecture, and weights or scales that do not fit
        the config and the description.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"There is no checkpoint directory {directory}.")
        config = parse_config(read_json(directory / CONFIG_NAME))
        tensors: dict[str, TensorInfo] = {}
        for name, info in find_tensors(directory).items():
            canonical = canonical_name(name)
            if canonical in tensors:
                raise CheckpointError(
                    f"{directory} holds the weight {canonical} twice, under its old name and its "
                    "new one."
                )
            tensors[canonical] = info
        quantization = read_quantization(directory)
        required, optional = tensor_rules(config, quantization or Quantization())
        for name, rule in required.items():
            _check_tensor(directory, name, rule, tensors.get(name))
        for name, rule in optional.items():
            if name in tensors:
                _check_tensor(directory, name, rule, tensors[name])
        for name in (required | optional).keys() - model_weights(config).keys():
            if name in tensors:
                _check_scales(tensors[name])
        return cls(directory, config, tensors, quantization)

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Place, dtype and shape of a tensor, by its canonical name.

        Raises CheckpointError if there is none.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}.")
        return self.tensors[name]

    def read(self, name: str) -> AnyArray:
        """A tensor as a memory-mapped, read-only array (bf16 as `ml_dtypes.bfloat16`)."""
        return read_tensor(self.info(name))


def find_tensors(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a single or sharded checkpoint, under the names in the files.

    Raises CheckpointError for a directory without safetensors files, or with damaged ones.
    """
    if (directory / WEIGHTS_NAME).is_file():
        return read_header(directory / WEIGHTS_NAME)
    if (directory / INDEX_NAME).is_file():
        return _read_shards(directory)
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run any code when "
            "loaded and are never opened; convert them with transformers' "
            "save_pretrained(safe_serialization=True)."
        )
    raise CheckpointError(f"{directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}.")


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, which says where each tensor lies.")
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in weight_map.values():
        if not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{index} names the shard {str(shard)[:64]!r}, which is not a safetensors file of "
                "the checkpoint's own directory."
            )
        if shard not in shards:
            shards[shard] = read_header(directory / shard)
    tensors: dict[str, TensorInfo] = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index} places {name} in {shard}, which does not hold it.")
        tensors[name] = shards[shard][name]
    return tensors


def _is_plain_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(character in name for character in "/\\\0")
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint. Raises CheckpointError if it is missing, huge or malformed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {path.name}."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is damaged.")
    return parse_json_object(data, path)


def _check_tensor(directory: Path, name: str, rule: TensorRule, info: TensorInfo | None) -> None:
    if info is None:
        raise CheckpointError(
            f"{directory} has no tensor {name}, which its {CONFIG_NAME} or {QUANTIZATION_NAME} "
            f"implies with shape {list(rule.shapes[0])}."
        )
    if info.shape not in rule.shapes:
        raise CheckpointError(
            f"The tensor {name} has shape {list(info.shape)}, but {CONFIG_NAME} implies "
            f"{' or '.join(str(list(shape)) for shape in rule.shapes)}."
        )
    if info.dtype not in rule.dtypes:
        raise CheckpointError(
            f"The tensor {name} is of dtype {info.dtype}, but it must be "
            f"{' or '.join(rule.dtypes)}{_describe_source(directory)}."
        )


def _describe_source(directory: Path) -> str:
    if (directory / QUANTIZATION_NAME).exists():
        return f" by {QUANTIZATION_NAME}"
    return f", since there is no {QUANTIZATION_NAME} that says it is quantized"


def _check_scales(info: TensorInfo) -> None:
    scales = read_tensor(info)
    # Not the same as "any below or above": NaN is neither.
    if not ((scales >= MIN_SCALE) & (scales <= MAX_SCALE)).all():
        raise CheckpointError(
            f"The scales {info.name} in {info.file} must be numbers from {MIN_SCALE:.2g} to "
            f"{MAX_SCALE:g}, which float16 can hold, and some are not; quantize the checkpoint "
            "again."
        )
