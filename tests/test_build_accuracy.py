"""The accuracy table: written, read back, put into a bundle, shown; hostile ones are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from framesink.build.accuracy import (
    AccuracyRow,
    AccuracyTable,
    attach_accuracy,
    read_accuracy,
    read_checkpoint_accuracy,
)
from framesink.cli.main import framesink
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import (
    BuildError,
    BundleError,
    CheckpointError,
    VerificationError,
)

ROW = AccuracyRow(
    precision="int8",
    vision_precision="fp16",
    kv_precision="fp8",
    kl=1.5e-5,
    worst_kl=0.5,
    top1=0.9875,
    scores={"event F1": 0.75},
    weight_bytes=10_100_000,
)
TABLE = AccuracyTable(
    reference="model",
    method="simulated",
    source="clip.mp4",
    chunks=8,
    tokens=40,
    rows=(ROW, ROW.model_copy(update={"precision": "fp8", "scores": {}})),
    notes=("Read with care.",),
)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    directory = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, directory)
    return directory


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    TABLE.write(tmp_path)
    assert read_checkpoint_accuracy(tmp_path) == TABLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.json", "accuracy.md"]


def test_the_readable_form_shows_what_was_measured() -> None:
    lines = TABLE.to_markdown().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[0] == [
        *("language model", "vision", "K/V", "event F1"),
        *("mean KL", "worst KL", "top-1", "weights"),
    ]
    assert rows[2] == ["int8", "fp16", "fp8", "0.750", "1.5e-05", "5.0e-01", "0.9875", "10.1 MB"]
    assert rows[3][:4] == ["fp8", "fp16", "fp8", "–"]
    assert "Read with care." in lines
    assert "40 tokens of 8 chunks (clip.mp4)" in TABLE.description


def test_names_cannot_add_cells_or_links() -> None:
    row = ROW.model_copy(update={"precision": "a|b", "vision_precision": "[x](http://y)"})
    text = TABLE.model_copy(update={"rows": (row,), "source": "<b>_*`"}).to_markdown()
    assert "a\\|b" in text
    assert "\\[x\\](http://y)" in text
    assert "\\<b\\>\\_\\*\\`" in text


def test_a_bundle_takes_a_table_and_another_in_its_place(bundle: Path) -> None:
    before = Bundle.open(bundle).manifest
    assert read_accuracy(Bundle.open(bundle)) is None
    assert attach_accuracy(bundle, TABLE) == Bundle.open(bundle).manifest
    other = TABLE.model_copy(update={"chunks": 9})
    attach_accuracy(bundle, other)
    opened = Bundle.open(bundle, check="hashes")
    assert read_accuracy(opened) == other
    assert (bundle / "accuracy.md").read_text() == other.to_markdown()
    added = {"accuracy.json", "accuracy.md"}
    assert opened.manifest.files.keys() - before.files.keys() == added
    assert opened.manifest.accuracy == "accuracy.json"
    undone = opened.manifest.model_copy(update={"accuracy": None, "files": before.files})
    assert undone == before
    assert {path.name for path in bundle.iterdir()} == {*before.files, *added, "manifest.json"}


@pytest.mark.parametrize("steps", range(4))
def test_a_bundle_can_be_opened_wherever_attaching_ends(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Of the four files that replacing a table writes, only the first `steps` are written."""
    attach_accuracy(bundle, TABLE)
    other = TABLE.model_copy(update={"chunks": 9})
    replace, done = Path.replace, []

    def fail_later(self: Path, target: Path) -> Path:
        if len(done) == steps:
            raise OSError(28, "No space left on device")
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_later)
    with pytest.raises(BuildError, match="No space left on device"):
        attach_accuracy(bundle, other)
    found = read_accuracy(Bundle.open(bundle, check="hashes"))
    assert found == (TABLE if steps == 0 else None)
    assert not list(bundle.glob(".*.partial"))


def test_a_changed_table_is_noticed(bundle: Path) -> None:
    attach_accuracy(bundle, TABLE)
    path = bundle / "accuracy.json"
    path.write_text(path.read_text().replace("0.9875", "0.9999"))
    with pytest.raises(BundleError, match=r"accuracy\.json .* has changed"):
        Bundle.open(bundle)


def test_what_is_no_bundle_takes_no_table(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        attach_accuracy(tmp_path, TABLE)


def test_inspect_shows_the_table(bundle: Path) -> None:
    attach_accuracy(bundle, TABLE)
    runner = CliRunner(env={"COLUMNS": "200"})
    result = runner.invoke(framesink, ["inspect", str(bundle)])
    assert result.exit_code == 0, result.output
    for words in ("event F1", "0.9875", "10.1 MB", TABLE.description, "Read with care."):
        assert words in result.stdout


def _edited(**fields: object) -> str:
    content: dict[str, Any] = json.loads(TABLE.model_dump_json())
    return json.dumps({**content, **fields})


def _with_row(**fields: object) -> str:
    return _edited(rows=[{**json.loads(ROW.model_dump_json()), **fields}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{" * 100_000,
        _edited(rows=[]),
        _edited(extra=1),
        _edited(source="two\nlines"),
        _edited(source="\x1b[2J"),
        _with_row(kl=-1.0),
        _with_row(top1=1.5),
        _with_row(scores={"F1": 2.0}),
        _with_row(precision=""),
        _with_row(weight_bytes=-1),
        _with_row().replace("1.5e-05", "NaN"),
        _with_row().replace("1.5e-05", "Infinity"),
    ],
)
def test_tables_that_are_none(bundle: Path, text: str) -> None:
    (bundle / "accuracy.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"accuracy\.json is malformed .*; remove it\.$"):
        read_checkpoint_accuracy(bundle)


def test_a_malformed_table_in_a_bundle_is_one_sentence(bundle: Path) -> None:
    attach_accuracy(bundle, TABLE)
    opened = Bundle.open(bundle)
    (bundle / "accuracy.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"malformed at reference .*; build the bundle"):
        read_accuracy(opened)
