"""The files of a bundle: weights, graphs, companions, manifest. Plans are compiled elsewhere."""

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy
import onnx_ir

from framesink.build.graphs.language_model import author_language_model
from framesink.build.graphs.layers import external_weights
from framesink.build.graphs.vision_encoder import author_vision_encoder
from framesink.build.precision import part_of
from framesink.build.weights import write_weights
from framesink.runtime.bundle import hash_file
from framesink.runtime.manifest import (
    MANIFEST_NAME,
    ComputeType,
    FileRecord,
    GraphSpec,
    Manifest,
    PartName,
    TensorSpec,
)
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.quantization import FLOAT_DTYPES, Quantization, tensor_rules
from framesink.runtime.models.safetensors import read_header

WEIGHTS_NAME = "weights.safetensors"
PLANS_DIRECTORY = "plans"
_PACKAGES = ("framesink", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(slots=True)
class BundleWriter:
    """Fills a directory with a bundle's files and remembers their sizes and hashes.

    `checkpoint` holds what `quantization` says. `compiled_types` is each part's compute type in
    its TensorRT plan; weights that are not quantized are stored in it. `executed_types` is what
    ONNX Runtime computes each part in.
    """

    directory: Path
    checkpoint: Checkpoint
    quantization: Quantization
    compiled_types: Mapping[PartName, ComputeType]
    executed_types: Mapping[PartName, ComputeType]
    page_size: int
    files: dict[str, FileRecord] = field(default_factory=dict)

    def write_weights(self, on_progress: Callable[[float], None]) -> None:
        """Write the bundle's weights file: quantized tensors and scales as they are, the others
        converted.

        Raises BuildError as `framesink.build.weights.write_weights` does.
        """
        required, optional = tensor_rules(self.checkpoint.config, self.quantization)
        present = {name: rule for name, rule in optional.items() if name in self.checkpoint.tensors}
        types: dict[str, str] = {
            name: self.compiled_types[part_of(name)]
            if rule.dtypes == FLOAT_DTYPES
            else self.checkpoint.info(name).dtype
            for name, rule in {**required, **present}.items()
        }
        self.files[WEIGHTS_NAME] = write_weights(
            self.checkpoint, types, self.directory / WEIGHTS_NAME, on_progress
        )

    def author(self, part: PartName) -> tuple[GraphSpec, GraphSpec]:
        """Write a part's executed and compiled graph (one file where they are the same)."""
        compiled_type, executed_type = self.compiled_types[part], self.executed_types[part]
        executed = self._write_graph(part, f"{part}.onnx", executed_type)
        if compiled_type == executed_type:
            return executed, executed
        # Beside the weights: readers refuse external data outside of the graph's own directory.
        return executed, self._write_graph(part, f"{part}.compiled.onnx", compiled_type)

    def _write_graph(self, part: PartName, name: str, compute_type: ComputeType) -> GraphSpec:
        weights = external_weights(read_header(self.directory / WEIGHTS_NAME))
        config = self.checkpoint.config
        if part == "language_model":
            model = author_language_model(
                config,
                weights,
                compute_type=compute_type,
                page_size=self.page_size,
                cache_type=compute_type,
                quantization=self.quantization,
            )
        else:
            model = author_vision_encoder(
                config, weights, compute_type=compute_type, quantization=self.quantization
            )
        onnx_ir.save(model, self.directory / name)
        self.record(name)
        return GraphSpec(
            path=name,
            compute_type=compute_type,
            inputs=_tensor_specs(model.graph.inputs),
            outputs=_tensor_specs(model.graph.outputs),
        )

    def copy(self, sources: Sequence[Path]) -> None:
        """Copy files of the checkpoint to the top of the bundle."""
        for source in sources:
            shutil.copyfile(source, self.directory / source.name)
            self.record(source.name)

    def plan_path(self, part: PartName, targets: Sequence[str]) -> str:
        """The name of a part's plan for some architectures; its directory is made."""
        (self.directory / PLANS_DIRECTORY).mkdir(exist_ok=True)
        return f"{PLANS_DIRECTORY}/{part}.{'-'.join(targets)}.plan"

    def record(self, name: str) -> None:
        """Note size and hash of a file that is finished."""
        self.files[name] = file_record(self.directory / name)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, last of all."""
        path = self.directory / MANIFEST_NAME
        path.write_text(manifest_text(manifest), encoding="utf-8")


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    return FileRecord(size=path.stat().st_size, sha256=hash_file(path))


def manifest_text(manifest: Manifest) -> str:
    """A manifest as it is written."""
    return manifest.model_dump_json(indent=2) + "\n"


def tool_versions(builder: Mapping[str, str]) -> dict[str, str]:
    """Versions of what took part in a build; `builder` is that of the plans."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "numpy": numpy.__version__, **packages, **builder}


def _tensor_specs(values: Sequence[onnx_ir.Value]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
        dtype = value.dtype.numpy().name
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)
