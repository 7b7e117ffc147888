"""The same work on many things, in processes of one thread each, its results kept in files."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")


def spread(
    work: Callable[[Task], Any], tasks: Mapping[Path, Task], processes: int
) -> dict[Path, Any]:
    """What `work` finds for each task, of JSON's types, by the file it is kept in.

    What a file of an earlier run holds is not looked for again. With one process the work is done
    in this one.
    """
    jobs = [_Job(work, task, path) for path, task in tasks.items()]
    if processes == 1 or len(jobs) < 2:
        return {job.path: job.run() for job in jobs}
    # Forked processes would share the threads of torch and ONNX Runtime.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=context, initializer=_use_one_thread
    ) as pool:
        return dict(zip(tasks, pool.map(_Job.run, jobs), strict=True))


@dataclass(frozen=True, slots=True)
class _Job(Generic[Task]):
    work: Callable[[Task], Any]
    task: Task
    path: Path

    def run(self) -> Any:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.work(self.task)) + "\n")
            partial.replace(self.path)
        return json.loads(self.path.read_text())


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
