"""What the stand-in of TensorRT-LLM runs: a checkpoint in transformers, one prompt at a time.

Positions, embeddings and attention are transformers' own; nothing of framesink's runtime is used.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference.dense_streaming import patchify
from reference.positions import GridSize
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

VIDEO_PAD = "<|video_pad|>"


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt as the model reads it: ids with a pad per vision token, and the videos' patches,
    grids and seconds per grid step. `media` names each video by its content."""

    ids: list[int]
    patches: list[torch.Tensor]
    grids: list[GridSize]
    seconds: list[float]
    media: list[str]
    pad: int


@cache
def load_runner(directory: Path) -> "Runner":
    """One runner per checkpoint: the stand-in may be made anew in every test."""
    return Runner(directory)


class Runner:
    """Greedy decoding of one prompt; steps of several take turns."""

    def __init__(self, directory: Path) -> None:
        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._one_at_a_time = threading.Lock()

    def encode(self, text: str, videos: Sequence[Any], fps: float | list[float]) -> Encoded:
        """Raises ValueError where placeholders and videos do not match."""
        merge = self._model.config.vision_config.spatial_merge_size
        pad = self.tokenizer.token_to_id(VIDEO_PAD)
        plain = self.tokenizer.encode(text, add_special_tokens=False).ids
        if plain.count(pad) != len(videos):
            raise ValueError(f"{plain.count(pad)} placeholders for {len(videos)} videos")
        rates = fps if isinstance(fps, list) else [fps] * len(videos)
        ids: list[int] = []
        patches, grids, media = [], [], []
        waiting = iter(videos)
        for token in plain:
            if token != pad:
                ids.append(token)
                continue
            frames = np.stack([np.asarray(frame) for frame in next(waiting).frames])
            rows, grid = patchify(frames, merge)
            patches.append(rows)
            grids.append(grid)
            media.append(hashlib.sha256(frames.tobytes()).hexdigest())
            ids += [pad] * (len(rows) // merge**2)
        temporal = self._model.config.vision_config.temporal_patch_size
        seconds = [temporal / rate for rate in rates]
        return Encoded(ids, patches, grids, seconds, media, pad)

    @torch.no_grad()
    def tokens(self, prompt: Encoded) -> Iterator[int]:
        """The likeliest tokens after a prompt, for ever."""
        model, pasts = self._model, DynamicCache()
        ids = torch.tensor([prompt.ids])
        kinds = (ids == prompt.pad).int() * 2
        grids = torch.tensor(prompt.grids) if prompt.grids else None
        positions, _ = model.model.get_rope_index(
            ids, kinds, video_grid_thw=grids, second_per_grid_ts=torch.tensor(prompt.seconds)
        )
        hidden = model.get_input_embeddings()(ids)
        with self._one_at_a_time:
            if grids is not None:
                pixels = torch.cat(prompt.patches).float()
                vision = torch.cat(model.model.get_video_features(pixels, grids).pooler_output)
                hidden[ids == prompt.pad] = vision.to(hidden.dtype)
        following = int(positions.max()) + 1
        while True:
            with self._one_at_a_time:
                state = model.model.language_model(
                    inputs_embeds=hidden, position_ids=positions, past_key_values=pasts
                ).last_hidden_state
                token = int(model.lm_head(state[0, -1]).argmax())
            yield token
            hidden = model.get_input_embeddings()(torch.tensor([[token]]))
            positions = torch.full((3, 1, 1), following)
            following += 1
