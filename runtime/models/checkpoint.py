"""A Hugging Face checkpoint directory, opened lazily: sizes and tensor places, no weights read.

Only safetensors and JSON are read; nothing is unpickled and no code of the checkpoint is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from framesink.runtime.arrays import AnyArray
from framesink.runtime.errors import CheckpointError
from framesink.runtime.models.config import ModelConfig, parse_config
from framesink.runtime.models.safetensors import (
    TensorInfo,
    parse_json_object,
    read_header,
    read_tensor,
)
from framesink.runtime.models.weights import Shape, canonical_name, model_weights

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_JSON_BYTES = 64_000_000
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOAT_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint whose weights are all there, with the shapes its config implies.

    Tensors go by their canonical names (`framesink.runtime.models.weights`), however the files
    call them.
    """

    directory: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Read `config.json` and the headers of the safetensors files.

        Raises CheckpointError, in one sentence, for a directory, config or weight file that is
        missing or damaged, an unknown architecture, and weights that do not fit the config.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"There is no checkpoint directory {directory}.")
        config = parse_config(_read_json(directory / CONFIG_NAME))
        tensors: dict[str, TensorInfo] = {}
        for name, info in _find_tensors(directory).items():
            canonical = canonical_name(name)
            if canonical in tensors:
                raise CheckpointError(
                    f"{directory} holds the weight {canonical} twice, under its old name and its "
                    "new one."
                )
            tensors[canonical] = info
        for name, shape in model_weights(config).items():
            _check_weight(directory, name, shape, tensors.get(name))
        return cls(directory, config, tensors)

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


def _find_tensors(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a single or sharded checkpoint, under the names in the files."""
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
    weight_map = _read_json(index).get("weight_map")
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


def _read_json(path: Path) -> dict[str, Any]:
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


def _check_weight(directory: Path, name: str, shape: Shape, info: TensorInfo | None) -> None:
    if info is None:
        raise CheckpointError(
            f"{directory} has no weight {name}, which its config.json implies with shape "
            f"{list(shape)}."
        )
    if info.shape != shape:
        raise CheckpointError(
            f"The weight {name} has shape {list(info.shape)}, but config.json implies "
            f"{list(shape)}."
        )
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"The weight {name} is of dtype {info.dtype}; {', '.join(FLOAT_DTYPES)} are supported."
        )
