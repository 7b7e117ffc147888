"""Work beside the steps: on a CUDA stream of its own, waited for where its result is read."""

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """Runs work whose result the main stream reads later. On the CPU it is an ordinary call."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Launch `work` after what was launched here before. Its result may be read in the stream
        that is current now, after `join`."""
        if self._stream is None or self._done is None:
            return work()
        reader = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            result = work()
            self._done.record()
        # Its memory must not be given away before the reader has passed.
        result.record_stream(reader)
        return result

    def join(self) -> None:
        """Let the current stream wait for all that was launched here."""
        if self._stream is not None and self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)
