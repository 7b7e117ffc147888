"""The same work on many things, in processes of one thread each."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Task = TypeVar("Task")
Found = TypeVar("Found")


def spread(work: Callable[[Task], Found], tasks: Sequence[Task], processes: int) -> list[Found]:
    """What `work` finds for each task, in their order; in this process if there is only one."""
    if processes == 1 or len(tasks) < 2:
        return [work(task) for task in tasks]
    # Forked processes would share the threads of torch and ONNX Runtime.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(tasks)), mp_context=context, initializer=_use_one_thread
    ) as pool:
        return list(pool.map(work, tasks))


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
