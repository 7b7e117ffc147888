"""The border between integers and tensors: what an executor is given and gives back.

Above it (sessions, scheduler, policies) everything is integers and host arrays; below it live the
weights and the K/V pages. One dataclass per direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from framesink.runtime.arrays import BoolArray, Float32Array, Int32Array, UInt8Array
from framesink.runtime.preprocess import Grid
from framesink.runtime.sampler import TokenChoice

# In the place of a token id: see SequenceInput.
NEXT_TOKEN = -1


@dataclass(frozen=True, slots=True, eq=False)
class ContextView:
    """The K/V rows a sequence may attend to.

    `block_table` int32 `[P]`, P ≥ 1: pages in the order they are read. Row `r` of page
    `block_table[p]` is slot `p * page_size + r` of the view. `positions` int32
    `[3, P * page_size]`: M-RoPE position (t, h, w) of every slot, 0 where invalid. `valid` bool
    `[P * page_size]`: whether a slot holds a row of this sequence. `bases` int32
    `[P * page_size]`: base of the span a row belongs to. A row's place, `positions - bases`, never
    changes, so an executor may store keys rotated by it and rotate queries by the base instead.
    `edition` names the context and counts its changes other than added rows: of two views of one
    edition the later has the earlier's rows where they were, so an executor may keep what it made
    of them. `rows` is how many slots are valid, where that is known.
    """

    block_table: Int32Array
    positions: Int32Array
    valid: BoolArray
    bases: Int32Array | None = None
    edition: tuple[int, int] | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SequenceInput:
    """One session's share of a step: s ≥ 1 new tokens, appended after its context.

    `token_ids` int32 `[s]`; `NEXT_TOKEN` alone is the one that the session's step before chooses,
    which has been launched and not been collected (see LaunchingExecutor). `vision_embeddings`
    float32 `[v, hidden]` replaces, in order, the embeddings of the v video placeholder tokens among
    them (None when there are none).
    `positions` int32 `[3, s]`. `slots` int32 `[s]`: where each new K/V row goes, as
    `page * page_size + row`. `context` does not include the new tokens.
    `needs_logits` is False for a prefill part that is not the last of its prompt. `bases` int32
    `[s]`: base of each new token's span (see ContextView). `choice` says how the next token is
    chosen, for an executor that can do it (see ChoosingExecutor).
    """

    token_ids: Int32Array
    vision_embeddings: Float32Array | None
    positions: Int32Array
    slots: Int32Array
    context: ContextView
    needs_logits: bool
    bases: Int32Array | None = None
    choice: TokenChoice | None = None


class VisionEncoder(Protocol):
    """Runs the vision encoder. Used from one thread only."""

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """Patches float32 `[t·h·w, patch_dim]` to embeddings float32 `[t·h·w / merge², hidden]`.

        An executor may answer with an array of its own device and type, which can be sliced and
        given to its `step`, and is nobody else's business.
        """
        ...

    def close(self) -> None:
        """Free the weights."""
        ...


class Executor(VisionEncoder, Protocol):
    """Runs the model and owns the K/V pages. Used from one thread only."""

    name: str
    page_size: int
    num_pages: int

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Run one in-flight batch; the new K/V rows are in their slots when it returns.

        Returns per sequence the logits float32 `[vocab]` of its last token, or None where they
        were not asked for.
        """
        ...

    def close(self) -> None:
        """Free weights and pages."""
        ...


@runtime_checkable
class ChoosingExecutor(Executor, Protocol):
    """One that can choose tokens where its logits are, so that these need not travel."""

    def step_and_choose(self, batch: Sequence[SequenceInput]) -> list[Float32Array | int | None]:
        """As `step`, but with the token that `choice` describes in place of logits, for a sequence
        that has one. It is the token `Sampler.sample` takes from those logits, but for sums that
        are rounded otherwise. It may answer with logits all the same."""
        ...


@runtime_checkable
class LaunchingExecutor(ChoosingExecutor, Protocol):
    """One whose steps are worked on elsewhere, one after the other, while the host goes on.

    K/V rows of a launched step count as written for every step launched later. So slots may be
    given away, and written anew, while a step that reads or writes them is under way.
    """

    def launch(self, batch: Sequence[SequenceInput]) -> object:
        """Begin a step; `batch` is not read after the return. At most two steps are launched and
        not collected."""
        ...

    def collect(self, launched: object) -> list[Float32Array | int | None]:
        """Wait for the oldest step not collected yet, which `launch` returned: its answers, as
        `step_and_choose` gives them."""
        ...


@runtime_checkable
class FrameEncoder(Protocol):
    """An executor that makes patches itself, where they are needed."""

    def hold_frames(self, frames: UInt8Array) -> UInt8Array:
        """A copy of one chunk's frames uint8 `[T, H, W, 3]`, of any size, kept where they are read
        fastest; it is nobody else's business. May be called from any thread."""
        ...

    def encode_frames(self, chunks: Sequence[UInt8Array], grid: Grid) -> list[Float32Array]:
        """Chunks of one shape, as `hold_frames` kept them, to embeddings as
        `VisionEncoder.encode_vision` gives them. Frames are resized to the size that `grid` is the
        patch grid of, as `framesink.runtime.preprocess.resize_frames` does it."""
        ...


@runtime_checkable
class TimedExecutor(Protocol):
    """An executor that knows what its GPU does."""

    def gpu_seconds(self) -> dict[str, float]:
        """Seconds the GPU has worked on `vision`, `prefill` and `decode` since the start, and as
        `busy` on any of them."""
        ...
