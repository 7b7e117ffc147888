"""An engine bundle on disk: opened, checked, and asked for its parts.

A bundle may come from anywhere. Nothing of it is used before the manifest has been read strictly
and every file it names has been found inside the directory, of the right size and content.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError

from framesink.runtime.errors import BundleError
from framesink.runtime.gpu import current_sm
from framesink.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    PartName,
    PlanSpec,
)
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

MAX_MANIFEST_BYTES = 16_000_000
TOKENIZER_NAME = "tokenizer.json"
REBUILD_HINT = "copy it again, or build it anew with build-engines"
_HASH_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle whose files are all there."""

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: Path | str, *, check: Literal["sizes", "hashes"] = "hashes") -> Self:
        """Read the manifest and check every file it lists, by size alone or by SHA-256 too.

        Raises BundleError, in one sentence, for a directory or manifest that is missing, of
        another schema version or malformed, and for a file that is missing, truncated, changed,
        not listed, or a link.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        for name in sorted(manifest.named_files() | {TOKENIZER_NAME}):
            if name not in manifest.files:
                raise BundleError(
                    f"The manifest of {directory} uses {name} without listing its size and hash; "
                    f"{REBUILD_HINT}."
                )
        for name in manifest.files:
            _check_size(directory, name, manifest)
        if check == "hashes":
            for name in manifest.files:
                _check_hash(directory, name, manifest)
        return cls(directory, manifest)

    def path(self, name: str) -> Path:
        """Where a file of the bundle lies. Raises BundleError if the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleError(f"The bundle {self.directory} has no file {name}.")
        return self.directory / name

    def checkpoint(self) -> Path | None:
        """The directory of the checkpoint that the bundle carries, None if it has none.

        Raises BundleError if that directory holds a file the manifest does not list.
        """
        name = self.manifest.checkpoint
        if name is None:
            return None
        for path in sorted((self.directory / name).rglob("*")):
            inside = path.relative_to(self.directory).as_posix()
            if not path.is_dir() and inside not in self.manifest.files:
                raise BundleError(
                    f"The bundle {self.directory} holds {inside}, which its manifest does not "
                    f"list; {REBUILD_HINT}."
                )
        return self.directory / name

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return Tokenizer.from_directory(self.directory)

    def protocol(self) -> ChatProtocol:
        """The chat format with the bundle's own system prompt."""
        return ChatProtocol(self.tokenizer(), self.manifest.streaming.system_prompt)

    def plan_for(self, part: PartName, sm: str | None = None) -> PlanSpec:
        """The plan of a part for an architecture such as `sm89`; by default this machine's GPU.

        Raises BundleError when there is no GPU, no plan at all, or none for that architecture.
        """
        plans = self.manifest.part(part).plans
        if not plans:
            raise BundleError(
                f"The bundle {self.directory} was built without TensorRT plans; build it again "
                "without --no-plans, or run it with the onnxruntime executor."
            )
        sm = sm or current_sm()
        if sm is None:
            raise BundleError(
                "A TensorRT plan needs a GPU and this machine has none; use the onnxruntime "
                "executor."
            )
        for plan in plans:
            if sm in plan.targets:
                return plan
        built = ", ".join(target for plan in plans for target in plan.targets)
        raise BundleError(
            f"The bundle {self.directory} has no {part} plan for {sm} (this machine), only "
            f"for {built}; build it again with --target {sm}."
        )

    def check_version(self, plan: PlanSpec) -> None:
        """Whether the installed TensorRT is the one that built `plan`.

        Raises BundleError when it is missing or of another version: plans are tied to theirs.
        """
        try:
            installed: str = import_module(plan.builder).__version__
        except Exception as error:  # a stub package or a missing library raises its own kind
            raise BundleError(
                f"{plan.path} needs {plan.builder} {plan.builder_version}, which is not installed."
            ) from error
        if _release(installed) != _release(plan.builder_version):
            raise BundleError(
                f"{plan.path} was built by {plan.builder} {plan.builder_version} but {installed} "
                f"is installed; install that version or build the bundle again."
            )


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise BundleError(f"There is no engine bundle {directory}; build one with build-engines.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise BundleError(f"{directory} is no engine bundle: it has no {MANIFEST_NAME}.") from error
    except OSError as error:
        raise BundleError(f"Cannot read {path}: {error.strerror or error}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; {REBUILD_HINT}.")
    _check_schema_version(path, data)
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path} is malformed at {place or 'its top'} ({first['msg']}); {REBUILD_HINT}."
        ) from error


def _check_schema_version(path: Path, data: bytes) -> None:
    """First of all: a manifest of another version would fail elsewhere, with a worse sentence."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON; {REBUILD_HINT}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {str(version)[:64]}, and this framesink reads version "
            f"{SCHEMA_VERSION}; build the bundle again with build-engines."
        )


def _check_size(directory: Path, name: str, manifest: Manifest) -> None:
    path = directory / name
    # A link could lead out of the bundle, at any level of the path.
    current = path
    while current != directory:
        if current.is_symlink():
            raise BundleError(f"{current} is a link; a bundle holds only files of its own.")
        current = current.parent
    if not path.is_file():
        raise BundleError(f"{name} is missing from the bundle {directory}; {REBUILD_HINT}.")
    size, expected = path.stat().st_size, manifest.files[name].size
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise BundleError(
            f"{name} of the bundle {directory} is {state}: {size} bytes instead of {expected}; "
            f"{REBUILD_HINT}."
        )


def _check_hash(directory: Path, name: str, manifest: Manifest) -> None:
    try:
        found = hash_file(directory / name)
    except OSError as error:
        raise BundleError(f"Cannot read {directory / name}: {error.strerror or error}.") from error
    if found != manifest.files[name].sha256:
        raise BundleError(
            f"{name} of the bundle {directory} has changed since it was built (its SHA-256 does "
            f"not match the manifest); {REBUILD_HINT}."
        )


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:3])
