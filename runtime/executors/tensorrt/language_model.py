"""The language model's plan over page pools that lie in the GPU's memory."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.cuda.capture import capture
from framesink.runtime.executors.tensorrt.page_rows import write_rows
from framesink.runtime.executors.tensorrt.plan import Plan

# Each keeps a context of its own.
MAX_GRAPHS = 32
Capture = Callable[[Callable[[], None], torch.device], tuple[Any, None]]


@dataclass(slots=True)
class _DecodeRun:
    """A decode step of one shape, whose inputs lie where those of all shapes do. A captured one has
    a context of its own, whose launches are what the graph replays."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    places: Tensor
    uses: int = 0
    context: Any = None
    graph: Any = None


class LanguageModelPlan:
    """Runs steps; the pools are bound in place, and new rows are written into them afterwards."""

    def __init__(self, plan: Plan, num_pages: int, *, capture_graph: Capture | None = None) -> None:
        """Allocate the pools. `capture_graph` makes CUDA graphs of decode steps, where the package
        does not: by default on a GPU.

        Raises CapacityError for more pages than the plan was built for, or than fit into memory.
        """
        self._plan = plan
        self._device = plan.device
        _, self._decode = plan.spec.profiles
        largest = self._decode.inputs["k_pages.0"].maximum[0]
        if num_pages > largest:
            raise CapacityError(
                f"{num_pages} pages are more than the {largest} that {plan.spec.path} was built "
                "for; ask for fewer sessions, or build with a larger --max-streams."
            )
        self.pools, self._buffers = self._allocate(num_pages)
        self.max_batch, self.max_pages = self._decode.inputs["block_table"].maximum
        if capture_graph is None and self._device.type == "cuda" and not plan.captures_itself:
            capture_graph = capture
        self._capture = capture_graph
        self._places = torch.zeros(4 * self.max_batch, dtype=torch.int64, device=self._device)
        self._runs: OrderedDict[tuple[int, ...], _DecodeRun] = OrderedDict()

    def run(self, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
        """One step of a group whose inputs, all but the pools, are given; `places` as `row_places`
        gives them. Returns the logits `[B, vocab]`, valid until the next step.

        Raises CapacityError for shapes the plan was not built for.
        """
        number = self._plan.profile_for({**inputs, **self.pools})
        if self._plan.spec.profiles[number] is self._decode:
            return self._run_decode(number, inputs, places)
        outputs = self._allocate_outputs(inputs)
        context = self._plan.context(number)
        self._plan.bind(context, {**inputs, **self.pools}, outputs)
        self._plan.launch(context)
        write_rows(self.pools, outputs, places)
        return outputs["logits"]

    def close(self) -> None:
        """Free graphs, pools and weights."""
        self._runs.clear()
        self.pools.clear()
        self._plan.close()

    def _run_decode(self, number: int, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
        run = self._decode_run(inputs)
        for name, value in inputs.items():
            run.inputs[name].copy_(value)
        run.places.copy_(places)
        run.uses += 1
        if run.graph is not None:
            run.graph.replay()
            return run.outputs["logits"]
        if self._capture is not None and run.uses > 1:
            # Another shape in this context would change what the graph relies on.
            run.context = self._plan.new_context(number)
        context = run.context or self._plan.context(number)
        self._plan.bind(context, {**run.inputs, **self.pools}, run.outputs)

        def work() -> None:
            self._plan.launch(context)
            write_rows(self.pools, run.outputs, run.places)

        if self._capture is not None and run.context is not None:
            run.graph, _ = self._capture(work, self._device)
            run.graph.replay()
        else:
            work()
        return run.outputs["logits"]

    def _decode_run(self, inputs: dict[str, Tensor]) -> _DecodeRun:
        """The run of these shapes; the least recently used is given up for one too many."""
        key = tuple(inputs["mask"].shape)
        run = self._runs.get(key)
        if run is None:
            if len(self._runs) == MAX_GRAPHS:
                self._runs.popitem(last=False)
            run = _DecodeRun(
                inputs={
                    name: self._buffers[name][: value.numel()].view(value.shape)
                    for name, value in inputs.items()
                },
                outputs=self._allocate_outputs(inputs),
                places=self._places[: 4 * key[0]].view(4, key[0]),
            )
            self._runs[key] = run
        self._runs.move_to_end(key)
        return run

    def _allocate_outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        count, new = inputs["inputs_embeds"].shape[:2]
        shapes = {}
        for spec in self._plan.spec.outputs:
            sizes = [size for size in spec.shape if isinstance(size, int)]
            shapes[spec.name] = (
                (count, *sizes) if spec.name == "logits" else (count, sizes[0], new, sizes[1])
            )
        return self._plan.allocate(shapes)

    def _allocate(self, num_pages: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By graph input: zeroed pages `[N, Hkv, page, D]` of every layer's K and V, and room for
        the other inputs of any decode step, so that they always lie in one place."""
        pools, buffers = {}, {}
        for name, bounds in self._decode.inputs.items():
            if "_pages." in name:
                pools[name] = (num_pages, *bounds.maximum[1:])
            else:
                buffers[name] = (math.prod(bounds.maximum),)
        try:
            allocated = self._plan.allocate(pools), self._plan.allocate(buffers)
        except RuntimeError as error:  # of which torch's out of memory is one
            raise CapacityError(
                f"{num_pages} pages do not fit into the GPU's memory beside the weights; ask for "
                "fewer sessions or a shorter context."
            ) from error
        for pool in allocated[0].values():
            pool.zero_()
        return allocated
