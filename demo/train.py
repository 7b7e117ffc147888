"""Trains the demo model on one GPU: `python -m demo.train --minutes 8 --output demo/model`.

Training is streaming: a batch of sessions steps through whole videos chunk by chunk with the
retained context, positions and moved rows of `SinkWindow`; every `SEGMENT` chunks the loss is
propagated back through the segment, and what is kept goes on into the next one, detached. Scenes
are rendered while training runs, so hardly one is seen twice.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo import forward, segment
from demo.checkpoint import EMBEDDING, model_config, write_checkpoint
from demo.feed import SceneFeed, ScenePool
from demo.forward import Sizes
from demo.metrics import Score
from demo.render import render_chunks
from demo.segment import run_segment
from demo.streaming import Streamer, Window
from demo.supervision import HEAD_OUTPUTS, cell_loss
from demo.tokenizer import write_tokenizer
from demo.turns import EMPTY, PART, TurnEncoder
from demo.world import Scene, make_scene
from framesink.runtime.arrays import AnyArray
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

SEGMENT = 16
SEGMENTS_PER_SCENE = 7
SCENE_CHUNKS = SEGMENT * SEGMENTS_PER_SCENE
SEEING_WEIGHT = 0.5  # of the dense targets at the start of training; it falls to 0
SINK_WINDOW = Window()
SLIDING_WINDOW = Window(sink_text=0, recent_text=0)


def sizes_of(config: Qwen2_5_VLConfig) -> Sizes:
    """What the fast forward needs of a configuration."""
    text, vision = config.text_config, config.vision_config
    return Sizes(
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=text.rope_parameters["rope_theta"],
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        vision_depth=vision.depth,
        vision_num_heads=vision.num_heads,
        fullatt_block_indexes=tuple(vision.fullatt_block_indexes),
    )


def initial_weights(config: Qwen2_5_VLConfig, seed: int) -> dict[str, torch.Tensor]:
    """Fresh float32 parameters under transformers' names, the tied head left out."""
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    depth = 2 * config.text_config.num_hidden_layers
    weights = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().clone()
        if value.ndim > 1:
            fan_in = value[0].numel()
            std = 0.02 if name == EMBEDDING else 0.7 / math.sqrt(fan_in)
            if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
                std /= math.sqrt(depth)
            value = torch.randn(value.shape, generator=generator) * std
        weights[name] = value
    return weights


def augment(frames: torch.Tensor) -> torch.Tensor:
    """Light and noise, drawn per chunk: `[N, 2, 112, 112, 3]` uint8 to float 0 to 255."""
    shape = (len(frames), 1, 1, 1, 1)
    device = frames.device
    gain = 1 + 0.12 * (2 * torch.rand(shape, device=device) - 1)
    shift = 10 * (2 * torch.rand(shape, device=device) - 1)
    sigma = 6 * torch.rand(shape, device=device)
    noise = torch.randn(frames.shape, device=device, dtype=torch.bfloat16)
    return (frames.float() * gain + shift + noise.float() * sigma).clamp(0, 255)


class Trainer:
    """Parameters, optimizer, and the sessions that are being streamed."""

    def __init__(
        self,
        sizes: Sizes,
        weights: dict[str, torch.Tensor],
        pool: ScenePool,
        batch: int,
        peak: float,
    ) -> None:
        self.sizes, self.pool, self.batch, self.peak = sizes, pool, batch, peak
        self.device = pool.device
        self.dtype = torch.bfloat16
        self.master = {
            name: value.to(self.device).requires_grad_() for name, value in weights.items()
        }
        # The head that says what each part of the picture shows; it is not kept.
        self.head = torch.zeros(HEAD_OUTPUTS, weights[EMBEDDING].shape[1], device=self.device)
        self.head.normal_(std=0.02).requires_grad_()
        decayed = [value for value in self.master.values() if value.ndim > 1]
        others = [self.head, *(value for value in self.master.values() if value.ndim == 1)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
            lr=peak,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.average = {name: value.detach().clone() for name, value in self.master.items()}
        self.streamer = Streamer(sizes, SINK_WINDOW, self.device)
        self.state = self.streamer.empty_state(batch, self.dtype)
        self.scenes = [pool.acquire() for _ in range(batch)]
        # Sessions start apart: the first scene of some is cut short.
        self.fresh = [True] * batch
        self.left = [SEGMENTS_PER_SCENE - index % SEGMENTS_PER_SCENE for index in range(batch)]
        self.segment = [0] * batch

    def step(self, rate: float, seeing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One segment of every session, one update at a learning rate.

        `seeing` is the weight of the dense targets. Returns the losses of replies and of those.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weights = {name: value.to(self.dtype) for name, value in self.master.items()}
        scene = torch.tensor(self.scenes, device=self.device)
        fresh = torch.tensor(self.fresh, device=self.device)
        first = torch.tensor(self.segment, device=self.device) * SEGMENT
        chunk = first[:, None] + torch.arange(SEGMENT, device=self.device)
        frames = self.pool.frames[scene[:, None], chunk].flatten(0, 1)
        ids = self.pool.ids[scene[:, None], chunk].long()
        targets = self.pool.targets[scene[:, None], chunk].long()
        factors = self.pool.weights[scene[:, None], chunk]
        patches = forward.to_patches(augment(frames)).to(self.dtype)
        vision = forward.encode_vision(weights, self.sizes, patches).unflatten(0, (-1, SEGMENT))
        prefix = self.streamer.prefix(weights, self.pool.prefix[scene].long())
        self.state.ids[fresh] = EMPTY
        self.state.text_count[fresh] = 0
        hidden, self.state = run_segment(self.streamer, weights, prefix, self.state, ids, vision)
        logits = forward.logits(weights, self.sizes, hidden).float()
        losses = functional.cross_entropy(
            logits.flatten(0, 2), targets.flatten(), ignore_index=EMPTY, reduction="none"
        )
        loss = (losses * factors.flatten()).sum() / factors.sum()
        cells = self.pool.cells[scene[:, None], chunk].flatten(0, 1)
        outputs = functional.linear(vision.flatten(0, 1), self.head.to(self.dtype))
        seen_loss = cell_loss(outputs, cells)
        (loss + seeing * seen_loss).backward()
        torch.nn.utils.clip_grad_norm_([*self.master.values(), self.head], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._next_segment()
        return loss.detach(), seen_loss.detach()

    def update_average(self, decay: float) -> None:
        """Move the averaged parameters, which are what is kept in the end."""
        average, master = list(self.average.values()), list(self.master.values())
        torch._foreach_lerp_(average, [value.detach() for value in master], 1 - decay)

    def _next_segment(self) -> None:
        for index in range(self.batch):
            self.segment[index] += 1
            self.left[index] -= 1
            self.fresh[index] = self.left[index] == 0
            if self.fresh[index]:
                self.pool.release(self.scenes[index])
                self.scenes[index] = self.pool.acquire()
                self.segment[index], self.left[index] = 0, SEGMENTS_PER_SCENE


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


def schedule(done: float, peak: float) -> float:
    """Learning rate at a share `done` of the training time: a short rise, then a cosine to 0."""
    warm = 0.03
    if done < warm:
        return peak * max(0.02, done / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / (1 - warm))))


def choose_attention(name: str) -> None:
    """Which of PyTorch's attention kernels to use: "any" leaves the choice to it."""
    segment.PAD_VALUES = name == "cudnn-padded"
    if name.startswith("cudnn"):
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    elif name == "efficient":
        torch.backends.cuda.enable_cudnn_sdp(False)


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters as they are after being stored in fp16."""
    return {name: value.detach().half().float() for name, value in weights.items()}


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="where weights and log go")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--pool", type=int, default=2048, help="scenes kept on the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluation-scenes", type=int, default=128)
    parser.add_argument("--evaluation-chunks", type=int, default=112)
    parser.add_argument("--start-from", type=Path, help="safetensors to go on from")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--attention", choices=("any", "cudnn", "cudnn-padded", "efficient"), default="any"
    )
    parser.add_argument("--compile", action="store_true", help="fuse the layers with torch.compile")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for line in train(options):
        print(line, flush=True)
        with (options.output / "train.log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def train(options: argparse.Namespace) -> Iterator[str]:
    """The whole of training; yields the lines of its log."""
    began = time.monotonic()
    write_tokenizer(options.output)
    tokenizer = Tokenizer.from_directory(options.output)
    buffers = 8 * options.workers
    feed = SceneFeed(options.output, SCENE_CHUNKS, options.workers, buffers)
    encoder = TurnEncoder(ChatProtocol(tokenizer))
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(options.seed)
    choose_attention(options.attention)
    if options.compile:
        segment.segment_layer = torch.compile(segment.segment_layer, dynamic=False)
        forward.vision_block = torch.compile(forward.vision_block, dynamic=False)
    config = model_config(tokenizer)
    sizes = sizes_of(config)
    weights = initial_weights(config, options.seed)
    if options.start_from is not None:
        stored = load_file(options.start_from)
        weights = {name: stored[name].float() for name in weights}
    evaluation = Evaluation(
        encoder, range(options.evaluation_scenes), options.evaluation_chunks, device
    )
    pool = ScenePool(feed, options.pool, device)
    pool.wait_for(min(options.pool, 2 * options.batch))
    trainer = Trainer(sizes, weights, pool, options.batch, options.rate)
    yield f"start {time.monotonic() - began:.1f} s, {pool.received} scenes"

    began = time.monotonic()
    limit = options.minutes * 60
    steps, next_report, scored = 0, 0.0, False
    behind: torch.Tensor | None = None
    while (done := (time.monotonic() - began) / limit) < 1:
        seeing = SEEING_WEIGHT * (1 - done)
        loss, seen_loss = trainer.step(schedule(done, options.rate), seeing)
        steps += 1
        trainer.update_average(min(0.998, steps / (steps + 10)))
        # Waiting for the step before keeps the device busy and the clock of the schedule true.
        if behind is not None:
            behind.item()
        behind = loss
        if done >= next_report:
            next_report = done + 0.02
            yield json.dumps(
                {
                    "step": steps,
                    "seconds": round(time.monotonic() - began, 1),
                    "loss": round(loss.item(), 4),
                    "seeing": round(seen_loss.item(), 4),
                    "scenes": pool.received,
                }
            )
        if done >= 0.5 and not scored:
            scored = True
            yield f"sink window: {evaluation.score(rounded(trainer.average), sizes, SINK_WINDOW)}"
    final = rounded(trainer.average)
    save_file({n: v.half().cpu() for n, v in final.items()}, options.output / "weights.safetensors")
    yield f"{steps} steps"
    for name, window in (("sink", SINK_WINDOW), ("sliding", SLIDING_WINDOW)):
        yield f"{name} window: {evaluation.score(final, sizes, window)}"
    write_checkpoint({n: v.cpu() for n, v in final.items()}, options.output)
    pool.close()
    feed.close()


if __name__ == "__main__":
    main()
