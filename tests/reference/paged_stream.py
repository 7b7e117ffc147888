"""A conversation with a video block, told by transformers at once, to an executor in pieces."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from framesink.runtime.executors.base import ContextView, SequenceInput
from framesink.runtime.executors.onnxruntime import OnnxRuntimeExecutor
from framesink.runtime.preprocess import Grid

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

PAGE = 4


@dataclass
class Conversation:
    """A token sequence with one video block, its vision inputs, and what transformers says of it:
    positions `[3, n]` and logits `[n, vocab]` of one dense forward."""

    ids: NDArray[np.int32]
    patches: NDArray[np.float32]
    grid: Grid
    positions: NDArray[np.int32]
    logits: NDArray[np.float64]


def make_conversation(
    model: "Qwen2_5_VLForConditionalGeneration", seed: int, grid: Grid, before: int, after: int
) -> Conversation:
    import torch

    random = np.random.default_rng(seed)
    config = model.config
    video = [config.video_token_id] * (grid.patches // 4)
    words = random.integers(0, 256, before + after).tolist()
    block = [config.vision_start_token_id, *video, config.vision_end_token_id]
    ids = torch.tensor([[*words[:before], *block, *words[before:]]])
    kinds = (ids == config.video_token_id).int() * 2
    patches = random.standard_normal((grid.patches, 1176)).astype(np.float32)
    grids = torch.tensor([[grid.t, grid.h, grid.w]])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values_videos=torch.from_numpy(patches).to(model.dtype),
            video_grid_thw=grids,
            second_per_grid_ts=torch.tensor([1.0]),
            mm_token_type_ids=kinds,
        ).logits[0]
    positions, _ = model.model.get_rope_index(
        ids, kinds, video_grid_thw=grids, second_per_grid_ts=torch.tensor([1.0])
    )
    return Conversation(
        ids[0].numpy().astype(np.int32),
        patches,
        grid,
        positions[:, 0].numpy().astype(np.int32),
        logits.numpy(),
    )


class PagedStream:
    """Feeds a conversation to an executor piece by piece, from slots in random pages with holes."""

    def __init__(
        self, executor: OnnxRuntimeExecutor, talk: Conversation, free_pages: list[int], seed: int
    ) -> None:
        self.executor = executor
        self.talk = talk
        self.random = np.random.default_rng(seed)
        self.vision = executor.encode_vision(talk.patches, talk.grid)
        self.done = 0
        slots = []
        while len(slots) < len(talk.ids):
            first = free_pages.pop() * PAGE
            # Every second page has a hole: a row that holds nothing of this sequence.
            skipped = self.random.integers(PAGE) if len(slots) % 2 else -1
            slots += [first + row for row in range(PAGE) if row != skipped]
        self.slots = np.array(slots[: len(talk.ids)], np.int32)

    def context(self) -> ContextView:
        pages = np.unique(self.slots[: self.done] // PAGE)
        table = self.random.permutation(pages).astype(np.int32)
        if not len(table):
            table = np.zeros(1, np.int32)
        place = {int(page): index for index, page in enumerate(table)}
        positions = np.zeros((3, len(table) * PAGE), np.int32)
        valid = np.zeros(len(table) * PAGE, np.bool_)
        for token, slot in enumerate(self.slots[: self.done]):
            cell = place[int(slot) // PAGE] * PAGE + int(slot) % PAGE
            positions[:, cell] = self.talk.positions[:, token]
            valid[cell] = True
        return ContextView(table, positions, valid)

    def next(self, count: int, *, needs_logits: bool = True) -> SequenceInput:
        part = slice(self.done, self.done + count)
        ids = self.talk.ids[part]
        context = self.context()
        is_video = self.talk.ids == self.executor._config.video_token_id
        seen = int(is_video[: self.done].sum())
        wanted = int(is_video[part].sum())
        self.done += count
        return SequenceInput(
            token_ids=ids,
            vision_embeddings=self.vision[seen : seen + wanted] if wanted else None,
            positions=self.talk.positions[:, part],
            slots=self.slots[part],
            context=context,
            needs_logits=needs_logits,
        )

    def expected(self) -> NDArray[np.float64]:
        return self.talk.logits[self.done - 1]
