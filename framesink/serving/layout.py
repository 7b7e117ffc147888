"""The private directory of a running server: repository, backends, and what the models report."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import framesink
from framesink.serving.run_directory import RunDirectory

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# Loading it fails, which makes the server not ready while the others go on.
DRAINING = "draining"
_DRAINING_CONFIG = f'name: "{DRAINING}"\nbackend: "none"\n'


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of the directory `path`, which only its owner may enter."""

    path: Path

    @property
    def repository(self) -> Path:
        """The model repository."""
        return self.path / "models"

    @property
    def backends(self) -> Path:
        """Links to backends."""
        return self.path / "backends"

    @property
    def run_directory(self) -> RunDirectory:
        """Where server and models tell each other things."""
        return RunDirectory(self.path / "run")

    def write(self, configs: Mapping[str, "ModelConfig"]) -> None:
        """Make the directories, and the repository with the given models."""
        from framesink.serving.model_config import config_text

        self.run_directory.path.mkdir()
        for name, config in configs.items():
            model = self.repository / name
            version = model / "1"
            source = model_source(name)
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, version, ignore=ignored)
            else:
                version.mkdir(parents=True)  # an ensemble has a version, but no files
            (model / "config.pbtxt").write_text(config_text(config), encoding="utf-8")

    def add_draining_model(self) -> None:
        """Add the model `draining`."""
        (self.repository / DRAINING / "1").mkdir(parents=True)
        path = self.repository / DRAINING / "config.pbtxt"
        path.write_text(_DRAINING_CONFIG, encoding="utf-8")


def model_source(name: str) -> Path:
    """The folder of a model's version 1 in `triton_repo/`."""
    return Path(framesink.__file__).parent / "triton_repo" / name / "1"
