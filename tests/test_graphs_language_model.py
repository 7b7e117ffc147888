"""The language model's graph: its contract, what it stores, and that TensorRT compiles it."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.checker
import onnx_ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from reference.compiling import compile_graph, input_specs
from reference.graph_files import LANGUAGE_MODEL, VISION_ENCODER, write_graphs

from framesink.runtime.manifest import ComputeType
from framesink.runtime.models.checkpoint import Checkpoint
from framesink.runtime.models.vision_segments import MASKED
from framesink.runtime.rope import MRopeTable

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

PAGE = 4


@pytest.fixture(scope="module")
def graphs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("graphs")
    write_graphs(tiny_checkpoint, directory, compute_type="float32", page_size=PAGE)
    return directory


def prefill(
    directory: Path,
    embeds: NDArray[np.float32],
    positions: NDArray[np.int32],
    *,
    filling: float = 0.0,
) -> dict[str, NDArray[Any]]:
    """All outputs of one sequence `[s, hidden]` over an empty context, from pools full of
    `filling`."""
    config = Checkpoint.open(directory).config.text
    count, half = len(embeds), config.head_dim // 2
    cos, sin = MRopeTable(config, np.float32).lookup(positions[:, None])
    mask = np.full((1, 1, count, PAGE + count), MASKED, np.float32)
    mask[..., PAGE:] = np.where(np.tri(count, dtype=np.bool_), 0.0, MASKED)
    session = onnxruntime.InferenceSession(directory / LANGUAGE_MODEL)
    pool = np.full((1, config.num_key_value_heads, PAGE, config.head_dim), filling, np.float32)
    feeds = {
        "inputs_embeds": embeds[None],
        "cos_new": cos,
        "sin_new": sin,
        "cos_ctx": np.ones((1, PAGE, half), np.float32),
        "sin_ctx": np.zeros((1, PAGE, half), np.float32),
        "mask": mask,
        "block_table": np.zeros((1, 1), np.int32),
        "last": np.array([count - 1], np.int32),
    }
    for layer in range(config.num_hidden_layers):
        feeds |= {f"k_pages.{layer}": pool, f"v_pages.{layer}": pool}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_keys_are_stored_before_rope_and_without_bias(
    graphs: Path, tiny_model: "Qwen2_5_VLForConditionalGeneration"
) -> None:
    import torch

    ids = torch.tensor([[5, 9, 30, 2, 77]])
    text = tiny_model.model.language_model
    positions = np.arange(40, 45, dtype=np.int32)[None].repeat(3, axis=0)
    projected: dict[str, NDArray[np.float64]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            rows = output - module.bias if name.startswith("k") else output
            shape = (1, ids.shape[1], -1, text.layers[0].self_attn.head_dim)
            projected[name] = rows.reshape(shape).transpose(1, 2).numpy()

        return hook

    hooks = []
    for index, layer in enumerate(text.layers):
        for kind in ("k", "v"):
            module = getattr(layer.self_attn, f"{kind}_proj")
            hooks.append(module.register_forward_hook(keep(f"{kind}_new.{index}")))
    with torch.no_grad():
        embeds = text.embed_tokens(ids)
        hidden = text(
            inputs_embeds=embeds, position_ids=torch.from_numpy(positions)[:, None].long()
        ).last_hidden_state
        logits = tiny_model.lm_head(hidden)[:, -1].numpy()
    for hook in hooks:
        hook.remove()

    outputs = prefill(graphs, embeds[0].numpy().astype(np.float32), positions)
    for name, expected in {**projected, "logits": logits}.items():
        np.testing.assert_allclose(outputs[name], expected, atol=2e-5 * np.abs(expected).max())
    assert len(outputs) == len(projected) + 1


def test_masked_rows_change_nothing(graphs: Path) -> None:
    """The mask is finite, and yet what it hides has no weight at all."""
    random = np.random.default_rng(0)
    embeds = random.standard_normal((3, 64)).astype(np.float32)
    positions = np.arange(3, dtype=np.int32)[None].repeat(3, axis=0)
    clean = prefill(graphs, embeds, positions)
    dirty = prefill(graphs, embeds, positions, filling=100.0)
    np.testing.assert_array_equal(clean["logits"], dirty["logits"])


def test_a_tied_head_is_the_embedding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    write_graphs(source, tmp_path / "graphs", compute_type="float32", page_size=PAGE)
    graph = onnx_ir.load(tmp_path / "graphs" / LANGUAGE_MODEL).graph
    assert "lm_head.weight" not in graph.initializers
    assert "model.embed_tokens.weight" in graph.initializers


def test_the_graphs_are_valid_onnx(graphs: Path) -> None:
    for file in (LANGUAGE_MODEL, VISION_ENCODER):
        onnx.checker.check_model(graphs / file, full_check=True)


def test_names_lead_back_to_the_code(graphs: Path) -> None:
    for file in (LANGUAGE_MODEL, VISION_ENCODER):
        graph = onnx_ir.load(graphs / file).graph
        names = [node.name or "" for node in graph]
        assert len(set(names)) == len(names)
        assert all("/" in name for name in names)
    assert any(name.startswith("blocks.1/mlp/down_proj/MatMul") for name in names)


def test_weights_stay_in_the_safetensors_file(graphs: Path) -> None:
    for file in (LANGUAGE_MODEL, VISION_ENCODER):
        assert (graphs / file).stat().st_size < 200_000
        for value in onnx_ir.load(graphs / file).graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            assert isinstance(tensor, onnx_ir.ExternalTensor) or tensor.size < 100


@pytest.mark.parametrize("compute_type", ["float16", "bfloat16"])
def test_tensorrt_compiles_both_graphs(
    compute_type: ComputeType, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Without a GPU, and without a warning that can mean wrong numbers."""
    pytest.importorskip("tensorrt_rtx")
    opened = write_graphs(tiny_checkpoint, tmp_path, compute_type=compute_type, page_size=PAGE)
    for file in (LANGUAGE_MODEL, VISION_ENCODER):
        plan = compile_graph(tmp_path / file, opened.config, ("sm89",), page_size=PAGE)
        names = {spec.name for spec in input_specs(tmp_path / file)}
        assert {spec.name for spec in plan.inputs} == names
