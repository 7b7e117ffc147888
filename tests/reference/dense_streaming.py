"""StreamingVLM's algorithm, dense and plain: a flat list of retained tokens, searched by pattern.

Nothing here knows spans, pages or lanes: blocks are found in the token list the way StreamingVLM
finds them (`streaming_vlm/utils/get_qwen_range.py`), and evicted, moved and cut by selecting rows
(`streaming_vlm/inference/inference.py`, `process_past_kv`). Where its code differs from its intent
the intent is followed: windows count turns, a cut keeps exactly the stated numbers of tokens, and a
truncated reply keeps its last word.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2_5_VLForConditionalGeneration, RepetitionPenaltyLogitsProcessor

from framesink.runtime.tokenizer import Tokenizer
from reference.dense_model import DenseModel
from reference.dense_policies import (
    DenseFullAttention,
    DensePolicy,
    DenseSinkWindow,
    DenseSlidingWindow,
)
from reference.positions import GridSize, Position, mrope_positions


@dataclass
class TurnRecord:
    """What one turn looked like: its prompt after eviction, and every generated token."""

    turn: int
    prompt: list[int]
    prompt_positions: list[Position]
    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float64]] = field(default_factory=list)


class DenseStream:
    """One stream. `chunk` is called once per chunk of video and returns the record of its turn.

    `never` are token ids no reply may hold, besides those that open a turn or a vision block.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Tokenizer,
        policy: DensePolicy,
        *,
        query: str | None = None,
        query_placement: Literal["pinned", "first_turn"] = "pinned",
        max_new_tokens: int = 20,
        never: Collection[int] = (),
        repetition_penalty: float = 1.0,
        system_prompt: str = "You are a helpful assistant.",
    ) -> None:
        self.dense = DenseModel(model)
        self.policy = policy
        self.max_new_tokens = max_new_tokens
        self.tokenizer = tokenizer
        self.turn = 0
        self.ids: list[int] = []
        self.grids: list[GridSize] = []
        self.time_steps: list[float] = []
        self.first_turn_query = query if query_placement == "first_turn" else None
        self.repetition_penalty = RepetitionPenaltyLogitsProcessor(repetition_penalty)

        vision = model.config.vision_config
        self.merge_size = vision.spatial_merge_size
        self.ticks_per_frame_pair = vision.temporal_patch_size * vision.tokens_per_second
        self.im_start = tokenizer.special("<|im_start|>")
        self.im_end = tokenizer.special("<|im_end|>")
        self.end_of_text = tokenizer.special("<|endoftext|>")
        self.vision_start = tokenizer.special("<|vision_start|>")
        self.vision_end = tokenizer.special("<|vision_end|>")
        self.video_pad = tokenizer.special("<|video_pad|>")
        # A reply that opened a turn or a vision block would be found as one.
        self.never = [self.im_start, self.vision_start, self.vision_end, self.video_pad, *never]
        self.newline = tokenizer.encode("\n")
        self.closing = tokenizer.encode(" ...")

        self.ids += tokenizer.encode(f"<|im_start|>system\n{system_prompt}<|im_end|>\n")
        if query is not None and query_placement == "pinned":
            self.ids += self._header("user") + tokenizer.encode_plain(query)
            self.ids += [self.im_end, *self.newline]
        self.ids += tokenizer.encode("<|im_start|>previous text\n<|im_end|>\n")
        self.pinned_users = len(self._blocks("user"))

    def chunk(
        self,
        frames: NDArray[np.uint8] | None,
        t0: float,
        t1: float,
        question: str | None = None,
        said: Sequence[int] | None = None,
    ) -> TurnRecord:
        """Evict, append a turn for `frames` (uint8 `[T, H, W, 3]`, of the model's size), reply.

        Without frames the turn is a question alone. The reply is greedy, or `said` where given:
        then the logits are those before each of its tokens.
        """
        if self.turn > 0:
            self._evict()
        self.ids += self._header("user")
        self.ids += self.tokenizer.encode(f"Time={t0:.1f}-{t1:.1f}s")
        vision = None
        if frames is not None:
            patches, grid = patchify(frames, self.merge_size)
            vision = self.dense.encode_vision(patches, grid)
            self.grids.append(grid)
            self.time_steps.append(self.ticks_per_frame_pair * (t1 - t0) / len(frames))
            self.ids += [self.vision_start, *[self.video_pad] * len(vision), self.vision_end]
        if self.turn == 0 and self.first_turn_query is not None:
            self.ids += self.tokenizer.encode_plain(self.first_turn_query)
        if question is not None:
            self.ids += self.tokenizer.encode_plain(question)
        self.ids += [self.im_end, *self.newline, *self._header("assistant")]

        record = TurnRecord(self.turn, list(self.ids), self.positions())
        self._reply(vision, record, said)
        self.turn += 1
        return record

    def _reply(self, vision: torch.Tensor, record: TurnRecord, said: Sequence[int] | None) -> None:
        unwritten: torch.Tensor | None = vision
        limit = self.max_new_tokens if said is None else len(said)
        while len(record.tokens) < limit:
            logits = self.dense.forward(
                self.ids[self.dense.rows :], unwritten, self.positions()
            ).double()
            unwritten = None
            record.logits.append(logits.numpy())
            scores = self.repetition_penalty(torch.tensor([self.ids]), logits[None].clone())
            scores[0, self.never] = float("-inf")
            token = int(scores.argmax()) if said is None else said[len(record.tokens)]
            record.tokens.append(token)
            if token in (self.im_end, self.end_of_text):
                break
            self.ids.append(token)
        self.ids += [self.im_end, *self.newline]

    def positions(self) -> list[Position]:
        """Positions of the whole retained list, contiguous from 0."""
        return mrope_positions(
            self.ids,
            self.grids,
            video_pad=self.video_pad,
            merge_size=self.merge_size,
            time_steps=self.time_steps,
        )

    def words(self, tokens: Sequence[int]) -> list[int]:
        """The words of a reply: its tokens without the closing and the stop token."""
        words = [token for token in tokens if token not in (self.im_end, self.end_of_text)]
        return words[: -len(self.closing)] if words[-len(self.closing) :] == self.closing else words

    # Eviction, before a turn is built.

    def _evict(self) -> None:
        match self.policy:
            case DenseSinkWindow() as policy:
                self._evict_sink_window(policy)
            case DenseSlidingWindow(turns):
                if self.turn >= turns:
                    start, _ = self._user_blocks()[0]
                    _, end = self._blocks("assistant")[0]
                    self._remove(start, end)
            case DenseFullAttention():
                pass

    def _evict_sink_window(self, policy: DenseSinkWindow) -> None:
        if self.turn >= policy.reply_turns:
            self._move_oldest_reply()
            if policy.vision_turns > policy.reply_turns:
                start, _ = self._user_blocks()[-policy.reply_turns]
                start += len(self._header("user"))
                self._remove(start, self.ids.index(self.vision_start, start))
            self._remove(*self._blocks("assistant")[0])
        if self.turn >= policy.vision_turns and policy.vision_turns < policy.reply_turns:
            start = self.ids.index(self.vision_start)
            self._remove(start, self.ids.index(self.vision_end, start) + 1)
        if self.turn >= max(policy.vision_turns, policy.reply_turns):
            self._remove(*self._user_blocks()[0])
        start, end = self._previous_text()
        if end - start > policy.sink_text + policy.recent_text:
            self._remove(start + policy.sink_text, end - policy.recent_text)

    def _move_oldest_reply(self) -> None:
        start, end = self._blocks("assistant")[0]
        start += len(self._header("assistant"))
        end -= 1 + len(self.newline)
        if self.ids[end - len(self.closing) : end] == self.closing and end > start:
            end -= len(self.closing)
        _, target = self._previous_text()
        order = list(range(len(self.ids)))
        self._keep(order[:target] + order[start:end] + order[target:start] + order[end:])

    def _remove(self, start: int, end: int) -> None:
        self._keep([*range(start), *range(end, len(self.ids))])

    def _keep(self, order: Sequence[int]) -> None:
        """Keep the tokens at `order`, in that order, with their rows and grids."""
        rows = self.dense.rows
        written = [index for index in order if index < rows]
        if written != list(order[: len(written)]):
            raise AssertionError("a token without a row would be moved before tokens with one")
        block_of = self._vision_block_numbers()
        kept_blocks = dict.fromkeys(block_of[index] for index in order if index in block_of)
        self.dense.select(written)
        self.ids = [self.ids[index] for index in order]
        self.grids = [self.grids[number] for number in kept_blocks]
        self.time_steps = [self.time_steps[number] for number in kept_blocks]

    def _vision_block_numbers(self) -> dict[int, int]:
        numbers: dict[int, int] = {}
        number = -1
        for index, token in enumerate(self.ids):
            if token == self.vision_start:
                number += 1
            elif token == self.video_pad:
                numbers[index] = number
        return numbers

    # Finding blocks by their token patterns.

    def _header(self, role: str) -> list[int]:
        return [self.im_start, *self.tokenizer.encode(f"{role}\n")]

    def _blocks(self, role: str) -> list[tuple[int, int]]:
        """`[start, end)` of every turn of `role`, its closing newline included."""
        header = self._header(role)
        found = []
        for start, token in enumerate(self.ids):
            if token == self.im_start and self.ids[start : start + len(header)] == header:
                end = self.ids.index(self.im_end, start) + 1
                found.append((start, end + len(self.newline)))
        return found

    def _user_blocks(self) -> list[tuple[int, int]]:
        return self._blocks("user")[self.pinned_users :]

    def _previous_text(self) -> tuple[int, int]:
        """`[start, end)` of the body of the `previous text` turn."""
        ((start, end),) = self._blocks("previous text")
        return start + len(self._header("previous text")), end - 1 - len(self.newline)

    def span_of(self, ids: Sequence[int], index: int) -> str:
        """Which part of the conversation `ids[index]` belongs to, for a readable difference."""
        start = max(i for i in range(index + 1) if ids[i] == self.im_start)
        role = self.tokenizer.decode(ids[start + 1 : start + 4]).split("\n")[0]
        number = sum(token == self.im_start for token in ids[:start])
        part = "vision" if ids[index] == self.video_pad else "text"
        return f"{part} of block {number} ({role}), token {index - start} of it"


def patchify(frames: NDArray[np.uint8], merge: int) -> tuple[torch.Tensor, GridSize]:
    """Patches as transformers' Qwen2-VL image processor orders them, from frames that need no
    resizing: 14-pixel patches, frames in pairs, CLIP's mean and deviation."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    video = (torch.from_numpy(frames).double() / 255 - mean) / deviation
    video = video.permute(0, 3, 1, 2)
    if len(video) % 2:
        video = torch.cat([video, video[-1:]])
    steps, channels, height, width = len(video) // 2, 3, video.shape[2] // 14, video.shape[3] // 14
    patches = video.view(
        steps, 2, channels, height // merge, merge, 14, width // merge, merge, 14
    ).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(steps * height * width, -1), (steps, height, width)
