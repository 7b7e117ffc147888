"""The import rules of docs/architecture.md, read from the source and tried in a bare process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED_FOLDERS = ("build", "calibration", "runtime")
# What runs on a GPU host alone, loaded only when it is asked for.
GPU_EXECUTORS = ("runtime/executors/cuda", "runtime/executors/tensorrt")
SOURCE_FOLDERS = (
    *LINKED_FOLDERS,
    *GPU_EXECUTORS,
    "framesink",
    "scripts",
    "triton_repo",
    "demo",
    "tests",
)
TRAINING_STACK = ("torch", "transformers", "accelerate", "modelopt")
AUTHORING_STACK = ("onnx", "onnx_ir", "onnxscript")
FORBIDDEN = {
    "runtime": (
        "framesink.build",
        "framesink.calibration",
        "framesink.cli",
        *TRAINING_STACK,
        *AUTHORING_STACK,
    ),
    "calibration": ("framesink.build", "framesink.cli"),
    **dict.fromkeys(
        GPU_EXECUTORS,
        ("framesink.build", "framesink.calibration", "framesink.cli", *AUTHORING_STACK),
    ),
    "build": ("framesink.cli",),
    "demo": ("framesink.cli",),
}


def _sources(folder: str) -> list[Path]:
    """Python files below a folder, links not followed; executors for GPUs are folders of their
    own."""
    apart = [] if folder in GPU_EXECUTORS else [ROOT / name for name in GPU_EXECUTORS]
    return sorted(
        path
        for path in (ROOT / folder).rglob("*.py")
        if path.is_file() and not any(inner in path.parents for inner in apart)
    )


def _modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _violations(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    found = []
    for path in _sources(folder):
        for line, module in _modules(ast.parse(path.read_text())):
            if any(module == name or module.startswith(f"{name}.") for name in forbidden):
                found.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return found


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_a_part_imports_only_what_it_may(folder: str) -> None:
    assert _violations(folder, FORBIDDEN[folder]) == []


@pytest.mark.parametrize("folder", SOURCE_FOLDERS)
def test_imports_are_absolute_and_go_through_framesink(folder: str) -> None:
    """`import runtime` would load a second copy of a module, and works in a checkout only."""
    assert _violations(folder, ("", *LINKED_FOLDERS)) == []


@pytest.mark.parametrize("folder", LINKED_FOLDERS)
def test_every_module_is_reached_through_framesink(folder: str) -> None:
    assert (ROOT / "framesink" / folder).resolve() == ROOT / folder
    for path in _sources(folder):
        package = path.parent
        while package != ROOT:
            assert (package / "__init__.py").is_file(), f"{package} is not a package"
            package = package.parent


def test_the_checker_sees_what_it_must(tmp_path: Path) -> None:
    source = (
        "import torch.nn as nn\n"
        "from .kv import pool\n"
        "def late():\n    from framesink import build\n"
        "import torchlike\n"
    )
    found = [module for _, module in _modules(ast.parse(source))]
    assert sorted(found) == [".kv.pool", "framesink.build", "torch.nn", "torchlike"]


def test_the_runtime_imports_on_a_server_host() -> None:
    """Without the packages a server host lacks, every module of `runtime` still imports."""
    modules = [
        ".".join(("framesink", *path.relative_to(ROOT).with_suffix("").parts))
        for path in _sources("runtime")
        if path.name != "__init__.py"
    ]
    lacking = (
        *TRAINING_STACK,
        *AUTHORING_STACK,
        "framesink.build",
        "framesink.calibration",
        "tensorrt",
        "tensorrt_rtx",
    )
    script = (
        "import importlib, sys\n"
        f"for name in {lacking!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
