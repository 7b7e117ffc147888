"""The accuracy table: what each choice of precision costs, as JSON and for people to read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self
from uuid import uuid4

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from framesink.build.bundle_writer import file_record, manifest_text
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import BuildError, CheckpointError, FramesinkError, VerificationError
from framesink.runtime.manifest import MANIFEST_NAME, Manifest

ACCURACY_NAME = "accuracy.json"
READABLE_NAME = "accuracy.md"
MAX_BYTES = 1_000_000


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a text must be one line of printable characters")
    return text


_Text = Annotated[str, Field(max_length=1000), AfterValidator(_printable)]
_Label = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
_NotNegative = Annotated[FiniteFloat, Field(ge=0.0)]
_Share = Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]


class AccuracyRow(BaseModel):
    """What one choice costs against the 16-bit model.

    `precision`, `vision_precision` and `kv_precision` are written as the options of
    `build-engines`. `kl` is the mean KL divergence of the next-token distribution in nats,
    `median_kl` the median, `worst_kl` the largest; `top1` the share of tokens whose likeliest
    candidate is the same. `scores` are those of a task, by their names, between 0 and 1. Sizes are
    in bytes: `weight_bytes` of all weights, `bundle_bytes` of a whole bundle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: _Label
    vision_precision: _Label
    kv_precision: _Label
    kl: _NotNegative
    worst_kl: _NotNegative
    top1: _Share
    median_kl: _NotNegative | None = None
    scores: dict[_Label, _Share] = Field(default_factory=dict, max_length=16)
    weight_bytes: NonNegativeInt | None = None
    bundle_bytes: NonNegativeInt | None = None


class AccuracyTable(BaseModel):
    """`accuracy.json`: one row per choice, and what they were measured on.

    `reference` is the 16-bit checkpoint's name, `method` how the choices were run, `source` the
    video; `tokens` tokens of `chunks` chunks were compared. `notes` are sentences a reader needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: _Text
    method: _Text
    source: _Text
    chunks: PositiveInt
    tokens: PositiveInt
    rows: tuple[AccuracyRow, ...] = Field(min_length=1, max_length=256)
    notes: tuple[_Text, ...] = Field(default=(), max_length=32)

    def write(self, directory: Path) -> None:
        """Write `accuracy.json` and `accuracy.md` into `directory`, each whole or not at all.

        Raises OSError if that is not possible.
        """
        _put(directory / ACCURACY_NAME, self.model_dump_json(indent=2) + "\n")
        _put(directory / READABLE_NAME, self.to_markdown())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read `accuracy.json`. Raises OSError or ValueError if that is not possible."""
        with path.open("rb") as file:
            return cls.model_validate_json(file.read(MAX_BYTES))

    def to_markdown(self) -> str:
        """The table with its description, as Markdown."""
        heading, *rows = self.cells()
        lines = [
            "# Accuracy",
            "",
            _escape(self.description),
            *(_escape(note) for note in self.notes),
            "",
            _markdown_row(heading),
            _markdown_row(["---"] * len(heading)),
            *(_markdown_row(cells) for cells in rows),
        ]
        return "\n".join(lines) + "\n"

    @property
    def description(self) -> str:
        """What was measured, in one sentence."""
        return (
            f"Against {self.reference} in 16 bits over {self.tokens} tokens of {self.chunks} "
            f"chunks ({self.source}); {self.method}. KL divergences are in nats."
        )

    def cells(self) -> Iterator[list[str]]:
        """The heading and then the rows, as text; columns that no row fills are left out."""
        scores = list(dict.fromkeys(name for row in self.rows for name in row.scores))
        has_median = any(row.median_kl is not None for row in self.rows)
        has_weights = any(row.weight_bytes is not None for row in self.rows)
        has_bundle = any(row.bundle_bytes is not None for row in self.rows)
        yield [
            *("language model", "vision", "K/V"),
            *scores,
            "mean KL",
            *(["median KL"] * has_median),
            *("worst KL", "top-1"),
            *(["weights"] * has_weights),
            *(["bundle"] * has_bundle),
        ]
        for row in self.rows:
            yield [
                *(row.precision, row.vision_precision, row.kv_precision),
                *(_number(row.scores.get(name), ".3f") for name in scores),
                _number(row.kl, ".1e"),
                *([_number(row.median_kl, ".1e")] * has_median),
                *(_number(row.worst_kl, ".1e"), _number(row.top1, ".4f")),
                *([_megabytes(row.weight_bytes)] * has_weights),
                *([_megabytes(row.bundle_bytes)] * has_bundle),
            ]


def read_accuracy(bundle: Bundle) -> AccuracyTable | None:
    """The table a bundle holds, if it holds one. Raises VerificationError if it is malformed."""
    name = bundle.manifest.accuracy
    if name is None:
        return None
    return _read(bundle.path(name), VerificationError, "build the bundle again")


def read_checkpoint_accuracy(directory: Path) -> AccuracyTable | None:
    """The table beside a checkpoint's weights, if there is one.

    Raises CheckpointError if it is malformed.
    """
    path = directory / ACCURACY_NAME
    return _read(path, CheckpointError, "remove it") if path.is_file() else None


def attach_accuracy(directory: Path, table: AccuracyTable) -> Manifest:
    """Put `table` into the finished bundle `directory`, in the place of one that is there.

    The manifest is written first without the table and last with it, each time whole: whenever this
    ends, the bundle can be opened. Returns the new manifest. Raises BundleError for a directory
    that is no bundle, BuildError if it cannot be written.
    """
    manifest = Bundle.open(directory, check="sizes").manifest
    try:
        if manifest.accuracy is not None:
            manifest = _without_accuracy(manifest)
            _put(directory / MANIFEST_NAME, manifest_text(manifest))
        table.write(directory)
        added = {name: file_record(directory / name) for name in (ACCURACY_NAME, READABLE_NAME)}
        manifest = manifest.model_copy(
            update={"accuracy": ACCURACY_NAME, "files": {**manifest.files, **added}}
        )
        _put(directory / MANIFEST_NAME, manifest_text(manifest))
    except OSError as error:
        raise BuildError(f"Cannot write {directory}: {error.strerror or error}.") from error
    return manifest


def _without_accuracy(manifest: Manifest) -> Manifest:
    names = (ACCURACY_NAME, READABLE_NAME)
    files = {name: record for name, record in manifest.files.items() if name not in names}
    return manifest.model_copy(update={"accuracy": None, "files": files})


def _read(path: Path, failure: type[FramesinkError], remedy: str) -> AccuracyTable:
    try:
        return AccuracyTable.read(path)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:64] for part in first["loc"])
        raise failure(
            f"{path} is malformed at {place or 'its top'} ({first['msg']}); {remedy}."
        ) from error
    except OSError as error:
        raise failure(f"Cannot read {path}: {error.strerror or error}.") from error


def _put(path: Path, text: str) -> None:
    """Write a file beside its place, then put it there."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f} MB"


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(text: str) -> str:
    """Names come from files: none of them may end a cell or begin a link or a tag."""
    for character in "\\|[]<>`*_":
        text = text.replace(character, f"\\{character}")
    return text
