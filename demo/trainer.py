"""One step of training: a run of turns of every session, forward, back, update.

A batch of sessions steps through whole videos with the retained context, positions and moved rows
of `SinkWindow`. Every `SEGMENT` chunks the loss is propagated back through the segment; what is
kept goes on into the next one, detached.
"""

import math

import torch
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo import forward
from demo.feed import ScenePool
from demo.forward import EMBEDDING, Sizes
from demo.segment import run_segment, segment_layer
from demo.streaming import Streamer, Window
from demo.supervision import HEAD_OUTPUTS, cell_loss
from demo.turns import EMPTY

SEGMENT = 16
SEGMENTS_PER_SCENE = 7
SCENE_CHUNKS = SEGMENT * SEGMENTS_PER_SCENE


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
        *,
        compiled: bool,
    ) -> None:
        """`weights` are float32, named as transformers names them; `compiled` fuses the layers with
        torch.compile."""
        self.sizes, self.pool, self.batch = sizes, pool, batch
        self._vision_block, self._segment_layer = forward.vision_block, segment_layer
        if compiled:
            self._vision_block = torch.compile(forward.vision_block, dynamic=False)
            self._segment_layer = torch.compile(segment_layer, dynamic=False)
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
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.average = {name: value.detach().clone() for name, value in self.master.items()}
        self.streamer = Streamer(sizes, Window(), self.device)
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
        vision = forward.encode_vision(weights, self.sizes, patches, self._vision_block)
        vision = vision.unflatten(0, (-1, SEGMENT))
        prefix = self.streamer.prefix(weights, self.pool.prefix[scene].long())
        self.state.ids[fresh] = EMPTY
        self.state.text_count[fresh] = 0
        hidden, self.state = run_segment(
            self.streamer, weights, prefix, self.state, ids, vision, self._segment_layer
        )
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
