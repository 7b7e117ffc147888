"""Trains the demo model on one GPU, in eight minutes on an H200.

    python -m demo.train --output demo/model --compile | tee demo/training.log

Scenes are rendered while training runs, so hardly one is seen twice. The learning rate follows the
clock, so that training ends when it should.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from demo.checkpoint import model_config, sizes_of, write_checkpoint
from demo.feed import SceneFeed, ScenePool
from demo.quick_evaluation import Evaluation
from demo.streaming import Window
from demo.tokenizer import write_tokenizer
from demo.trainer import SCENE_CHUNKS, Trainer, initial_weights
from demo.turns import TurnEncoder
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

SEEING_WEIGHT = 0.5  # of the dense targets at the start of training; it falls to 0
SINK_WINDOW = Window()
SLIDING_WINDOW = Window(sink_text=0, recent_text=0)


def schedule(done: float, peak: float) -> float:
    """Learning rate at a share `done` of the training time: a short rise, then a cosine to 0."""
    warm = 0.03
    if done < warm:
        return peak * max(0.02, done / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm) / (1 - warm))))


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters as they are after being stored in fp16."""
    return {name: value.detach().half().float() for name, value in weights.items()}


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint directory")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.6e-3)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--pool", type=int, default=2048, help="scenes kept on the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluation-scenes", type=int, default=96)
    parser.add_argument("--evaluation-chunks", type=int, default=96)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="fuse the layers with torch.compile")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for line in train(options):
        print(line, flush=True)


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
    # cuDNN's attention is the fastest for these shapes (6.9 ms on an H200; PyTorch's choice 10.2).
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    config = model_config(tokenizer)
    sizes = sizes_of(config)
    weights = initial_weights(config, options.seed)
    evaluation = Evaluation(
        encoder, range(options.evaluation_scenes), options.evaluation_chunks, device
    )
    pool = ScenePool(feed, options.pool, device)
    pool.wait_for(min(options.pool, 2 * options.batch))
    trainer = Trainer(sizes, weights, pool, options.batch, compiled=options.compile)
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
    yield f"{steps} steps"
    for name, window in (("sink", SINK_WINDOW), ("sliding", SLIDING_WINDOW)):
        yield f"{name} window: {evaluation.score(final, sizes, window)}"
    write_checkpoint({n: v.cpu() for n, v in final.items()}, options.output)
    pool.close()
    feed.close()


if __name__ == "__main__":
    main()
