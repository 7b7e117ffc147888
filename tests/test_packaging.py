"""What a wheel built from this tree holds, and that it works on its own."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGED_FOLDERS = ("build", "calibration", "framesink", "runtime", "triton_repo")
PROJECT_FILES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel, built in a copy of the tree so that the tree stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGED_FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, source / name)
    wheels = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(wheels), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = wheels.glob("framesink-*.whl")
    content = tmp_path_factory.mktemp("content")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(content)
    return content


def _run(script: str, content: Path, *flags: str) -> None:
    """Run a script that sees the wheel's content first, in an isolated interpreter."""
    prelude = f"import sys\nsys.path.insert(0, {str(content)!r})\n"
    result = subprocess.run(
        [sys.executable, "-I", *flags, "-c", prelude + script],
        cwd=content,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def _expected_modules() -> set[str]:
    below_framesink = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "framesink").rglob("*.py")  # which does not follow links
    }
    linked = {
        f"framesink/{path.relative_to(ROOT).as_posix()}"
        for folder in ("build", "calibration", "runtime", "triton_repo")
        for path in (ROOT / folder).rglob("*.py")
    }
    return below_framesink | linked


def test_the_wheel_holds_every_module_and_nothing_else(unpacked_wheel: Path) -> None:
    held = {path.relative_to(unpacked_wheel).as_posix() for path in unpacked_wheel.rglob("*.py")}
    assert held == _expected_modules()
    assert (unpacked_wheel / "framesink" / "py.typed").is_file()


def test_importing_framesink_needs_nothing_but_python(unpacked_wheel: Path) -> None:
    _run(
        "import framesink\n"
        "assert not {'numpy', 'cv2', 'onnxruntime', 'torch'} & set(sys.modules)\n"
        "from framesink.runtime.errors import BundleError\n"
        "assert issubclass(BundleError, framesink.FramesinkError)\n",
        unpacked_wheel,
        "-S",
    )


def test_the_runtime_of_the_wheel_imports_by_itself(unpacked_wheel: Path) -> None:
    modules = sorted(
        ".".join(path.relative_to(unpacked_wheel).with_suffix("").parts)
        for path in (unpacked_wheel / "framesink" / "runtime").rglob("*.py")
        if path.name != "__init__.py"
    )
    _run(
        "import importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import framesink\n"
        "for name in framesink.__all__: getattr(framesink, name)\n"
        "strays = [module.__file__ for name, module in sys.modules.items()\n"
        "          if name.startswith('framesink')\n"
        f"          and not (module.__file__ or '').startswith({str(unpacked_wheel)!r})]\n"
        "assert not strays, strays\n",
        unpacked_wheel,
    )


def test_entry_points_lead_to_functions(unpacked_wheel: Path) -> None:
    (path,) = unpacked_wheel.glob("framesink-*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(path)
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == {"framesink", "build-engines"}
    for target in scripts.values():
        module, function = target.split(":")
        _run(f"from {module} import {function}\nassert callable({function})\n", unpacked_wheel)


def test_the_wheel_can_be_served(unpacked_wheel: Path) -> None:
    _run(
        "from framesink.serving.contract import MODELS, STREAMING_VLM\n"
        "from framesink.serving.layout import model_source\n"
        "names = {model.name for model in MODELS} - {STREAMING_VLM}\n"
        "assert all((model_source(name) / 'model.py').is_file() for name in names)\n"
        f"assert str(model_source('preprocess')).startswith({str(unpacked_wheel)!r})\n",
        unpacked_wheel,
    )
