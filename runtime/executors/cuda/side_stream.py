"""Work beside the steps: on a CUDA stream of its own, waited for where its result is read."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SideStream:
    """Runs work whose result the main stream reads later. On the CPU it is an ordinary call."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # By where a result lies: as long as it has not been waited for, nothing else can lie there.
        self._done: dict[int, torch.cuda.Event] = {}

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Launch `work` after what was launched here before. Its result, and slices of it, may be
        read in the stream that is current now, after `join`."""
        if self._stream is None:
            return work()
        reader = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            result = work()
            done = torch.cuda.Event()
            done.record()
        # Its memory must not be given away before the reader has passed.
        result.record_stream(reader)
        self._done[_place(result)] = done
        return result

    def join(self, results: Iterable[Tensor]) -> None:
        """Let the current stream wait for `results`, or slices of them, and for none of those that
        were launched after them."""
        for result in results:
            done = self._done.pop(_place(result), None)
            if done is not None:
                torch.cuda.current_stream(result.device).wait_event(done)


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage().data_ptr()
    return place
