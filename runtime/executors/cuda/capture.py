"""Work on the GPU, captured as a CUDA graph."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
# The first runs compile kernels and make room in torch's pool, neither of which can be captured.
WARM_UPS = 2


def capture(
    work: Callable[[], _Result],
    device: torch.device,
    pool: Any = None,
    *,
    warm_ups: int = WARM_UPS,
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A graph of `work`, and the tensors that every replay writes its result into.

    Before it is captured it runs `warm_ups` times.

    Graphs of one `pool` share memory: of those only the latest replayed has a result.
    """
    stream = _warm_up_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads take memory meanwhile, for frames that come.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return graph, result


@cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: torch keeps memory apart by stream."""
    return torch.cuda.Stream(device)
