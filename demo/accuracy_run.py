"""What all accuracy measurements share: where things lie, which scenes, in how many processes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.accuracy_bundles import Scheme, build_bundles, observe
from demo.held_out import compare_on_scenes
from demo.parallel import Task, spread
from demo.scene import Scene
from demo.world import make_scene
from framesink.calibration.agreement import TurnAgreement
from framesink.calibration.recorded_turns import StreamSettings
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor


@dataclass(frozen=True, slots=True)
class Run:
    """Where things lie, which scenes are narrated, and on which of them tokens are compared."""

    work: Path
    checkpoint: Path
    scenes: Sequence[Scene]
    compared: Sequence[Scene]
    processes: int
    twin_size: float
    event_rate: float | None = None

    @property
    def statistics(self) -> Path:
        """The folder of what calibration sees of the checkpoint."""
        folder = self.work / "statistics"
        observe(self.checkpoint, folder)
        return folder

    def bundles(self, schemes: Sequence[Scheme]) -> dict[Scheme, Path]:
        """The bundles of some schemes, built if they are not there."""
        folder = self.work / "bundles"
        return build_bundles(self.checkpoint, self.statistics, schemes, folder, self.processes)

    def find(self, work: Callable[[Task], Any], tasks: Mapping[str, Task]) -> dict[str, Any]:
        """What `work` finds for each task, by its name. Kept, and not looked for again."""
        rate = "" if self.event_rate is None else f"-rate-{self.event_rate:g}"
        folder = self.work / "results" / f"{self.scenes[0].seconds}s{rate}"
        paths = {name: folder / f"{name}.json" for name in tasks}
        found = spread(work, {paths[name]: task for name, task in tasks.items()}, self.processes)
        return {name: found[path] for name, path in paths.items()}


@dataclass(frozen=True, slots=True)
class CompareTask:
    """Bundles to compare with a reference on one scene; see `make_scene` for what makes that."""

    reference: Path
    candidates: dict[str, Path]
    seed: int
    seconds: int
    event_rate: float | None = None

    @property
    def scene(self) -> Scene:
        """The scene, laid out again: only its seed travels between processes."""
        return make_scene(self.seed, self.seconds, event_rate=self.event_rate)


def executor(directory: Path) -> tuple[OnnxRuntimeExecutor, StreamSettings]:
    """ONNX Runtime on one thread over a bundle, with pages for one session."""
    bundle = Bundle.open(directory)
    settings = StreamSettings.from_bundle(bundle)
    pages = settings.num_pages(bundle.manifest.page_size)
    return OnnxRuntimeExecutor.from_bundle(bundle, num_pages=pages, threads=1), settings


def compare_bundles(task: CompareTask) -> dict[str, Any]:
    """The turns of each candidate, as JSON's types."""
    reference, settings = executor(task.reference)
    candidates = {name: executor(path)[0] for name, path in task.candidates.items()}
    turns = compare_on_scenes(reference, candidates, settings, [task.scene])
    return {name: turns_to_json(found) for name, found in turns.items()}


def turns_to_json(turns: Sequence[TurnAgreement]) -> list[list[Any]]:
    """Turns as JSON's types."""
    return [[turn.chunk, turn.kl, turn.same, turn.entropy] for turn in turns]


def turns_from_json(values: Sequence[Sequence[Any]]) -> list[TurnAgreement]:
    """What `turns_to_json` wrote."""
    return [
        TurnAgreement(chunk, tuple(kl), tuple(same), tuple(entropy))
        for chunk, kl, same, entropy in values
    ]
