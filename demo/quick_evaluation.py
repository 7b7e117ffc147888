"""Scores parameters during training: held-out scenes streamed together in torch."""

import numpy as np
import torch

from demo import forward
from demo.forward import EMBEDDING, Sizes
from demo.metrics import Score
from demo.render import render_chunks
from demo.scene import Scene
from demo.streaming import Streamer, Window
from demo.turns import EMPTY, PART, TurnEncoder
from demo.world import make_scene
from framesink.runtime.arrays import AnyArray


class Evaluation:
    """Held-out scenes, and the score of parameters on them in faithful streaming."""

    def __init__(
        self, encoder: TurnEncoder, seeds: range, chunks: int, device: torch.device
    ) -> None:
        self.encoder, self.device, self.chunks = encoder, device, chunks
        self.scenes: list[Scene] = [make_scene(seed, chunks) for seed in seeds]
        frames = np.stack([render_chunks(scene, drawn_at=336) for scene in self.scenes])
        self.frames: AnyArray = frames

    def score(self, weights: dict[str, torch.Tensor], sizes: Sizes, window: Window) -> Score:
        """Stream all scenes together, greedily, and score the replies."""
        with torch.no_grad():
            return self._score(weights, sizes, window)

    def _score(self, weights: dict[str, torch.Tensor], sizes: Sizes, window: Window) -> Score:
        streamer = Streamer(sizes, window, self.device)
        dtype = weights[EMBEDDING].dtype
        encoder, count = self.encoder, len(self.scenes)
        prefix_ids = torch.from_numpy(encoder.prefix("Say what happens.")).long()
        prefix = streamer.prefix(weights, prefix_ids.to(self.device).expand(count, -1))
        state = streamer.empty_state(count, dtype)
        replies: list[list[str]] = [[] for _ in self.scenes]
        for chunk in range(self.chunks):
            prompts = [
                encoder.prompt(float(chunk), question.text if question else None, first=chunk == 0)
                for question in (scene.truth[chunk].question for scene in self.scenes)
            ]
            prompt = torch.from_numpy(np.stack(prompts)).long().to(self.device)
            frames = torch.from_numpy(self.frames[:, chunk]).to(self.device)
            vision = forward.encode_vision(weights, sizes, forward.to_patches(frames).to(dtype))
            retained = streamer.context(prefix, state)
            turn = streamer.generate(weights, retained, prompt, vision, encoder.closing)
            state = streamer.advance(state, turn)
            for texts, words in zip(replies, turn.ids[:, PART["words"]].tolist(), strict=True):
                tokens = [token for token in words if token != EMPTY]
                texts.append(encoder.protocol.tokenizer.decode(tokens))
        score = Score()
        for scene, texts in zip(self.scenes, replies, strict=True):
            score.add(scene, texts)
        return score
