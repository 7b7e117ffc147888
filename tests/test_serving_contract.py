"""What the running server says of its models is what the contract says."""

from pathlib import Path

import pytest
import tritonclient.grpc as triton
from serving_server import RunningServer

from framesink.serving import contract
from framesink.serving.options import ServeOptions

ROOT = Path(__file__).parents[1]


@pytest.fixture
def client(demo_server: RunningServer):
    with triton.InferenceServerClient(demo_server.url) as client:
        yield client


@pytest.mark.parametrize("model", contract.MODELS, ids=lambda model: model.name)
def test_metadata_is_the_contract(
    client: triton.InferenceServerClient, model: contract.Model
) -> None:
    metadata = client.get_model_metadata(model.name)
    assert client.is_model_ready(model.name)
    for said, meant in ((metadata.inputs, model.inputs), (metadata.outputs, model.outputs)):
        found = {(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in said}
        expected = {(tensor.name, tensor.wire_type, tensor.wire_dims) for tensor in meant}
        assert found == expected


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of every table of a Markdown text."""
    lines = (line.strip() for line in text.splitlines())
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("| `")
    ]


def test_the_documentation_is_the_contract() -> None:
    rows = table_rows((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    tensors = {t.name: t for model in contract.MODELS for t in (*model.inputs, *model.outputs)}
    expected = [
        [f"`{t.name}`", t.data_type, f"`[{', '.join(map(str, t.shape))}]`", t.meaning]
        for t in tensors.values()
    ]
    expected += [[f"`{p.name}`", p.type, p.moment, p.meaning] for p in contract.PARAMETERS]
    assert [row for row in expected if row not in rows] == []
    assert len([row for row in rows if row[0][1:-1] in tensors]) == len(tensors)


def test_the_documentation_lists_every_model_and_limit() -> None:
    rows = table_rows((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    first = {row[0].strip("`") for row in rows}
    assert {model.name for model in contract.MODELS} <= first
    limits = {name for name in ServeOptions.model_fields if name.startswith("max_")}
    assert {f"--{name.replace('_', '-')}" for name in limits} <= first
    for row in rows:
        if not row[0].startswith("`--"):
            continue
        field = ServeOptions.model_fields.get(row[0].strip("`-").replace("-", "_"))
        if field is not None and field.default is not None:
            assert float(row[1].replace(",", "")) == field.default
