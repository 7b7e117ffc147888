"""Renders training scenes in worker processes and keeps a pool of them on the training device."""

import mmap
import multiprocessing
import queue
import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from demo.forward import VISION_TOKENS
from demo.render import render_chunks
from demo.scene import SIDE, STEPS_PER_CHUNK
from demo.supervision import TARGETS, cell_targets
from demo.turns import PREFIX_SLOTS, REPLY_LENGTH, SLOTS, TurnEncoder, random_query
from demo.world import TRAINING_SEEDS_START, make_scene
from framesink.runtime.arrays import AnyArray, UInt8Array
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

QUESTION_RATE = 0.3
_LATE_START = 0.3  # share of training scenes whose clock does not start at 0
_FRAME_SHAPE = (STEPS_PER_CHUNK, SIDE, SIDE, 3)


@dataclass(frozen=True, slots=True)
class EncodedScene:
    """A scene as training arrays, its frames apart: the session's first ids, and per chunk the ids
    of its turn, the targets and the loss weights of its reply, and what each part of the picture
    shows (`demo.supervision`)."""

    prefix: AnyArray
    ids: AnyArray
    targets: AnyArray
    weights: AnyArray
    cells: AnyArray


def encode_training_scene(
    seed: int, chunks: int, encoder: TurnEncoder
) -> tuple[UInt8Array, EncodedScene]:
    """Render and encode the scene of a seed, in a style that varies with the seed.

    Returns the frames uint8 `[chunks, 2, 112, 112, 3]` and the rest.
    """
    random = np.random.default_rng([seed, 11])
    scene = make_scene(seed, chunks, question_rate=QUESTION_RATE)
    start = float(random.integers(0, 5000)) if random.random() < _LATE_START else 0.0
    ids, targets, weights = encoder.scene(scene, start)
    size = int(random.choice([SIDE, SIDE, 2 * SIDE]))
    quality = int(random.integers(55, 96)) if random.random() < 0.4 else None
    frames = render_chunks(scene, drawn_at=size, jpeg_quality=quality)
    prefix = encoder.prefix(random_query(random))
    return frames, EncodedScene(prefix, ids, targets, weights, cell_targets(scene))


class SceneFeed:
    """Worker processes that render scenes into shared memory, one buffer a scene.

    Start it before CUDA is initialised: the workers are forked.
    """

    def __init__(self, tokenizer_directory: Path, chunks: int, workers: int, buffers: int) -> None:
        self.chunks = chunks
        context = multiprocessing.get_context("fork")
        shape = (buffers, chunks, *_FRAME_SHAPE)
        self._memory = mmap.mmap(-1, int(np.prod(shape)))
        self.frames = np.frombuffer(self._memory, np.uint8).reshape(shape)
        self._free: Any = context.Queue()
        self._ready: Any = context.Queue()
        for index in range(buffers):
            self._free.put(index)
        self._processes: list[BaseProcess] = [
            context.Process(
                target=self._work, args=(tokenizer_directory, worker, workers), daemon=True
            )
            for worker in range(workers)
        ]
        for process in self._processes:
            process.start()

    def _work(self, tokenizer_directory: Path, worker: int, workers: int) -> None:
        cv2.setNumThreads(1)
        encoder = TurnEncoder(ChatProtocol(Tokenizer.from_directory(tokenizer_directory)))
        seed = TRAINING_SEEDS_START + worker
        while True:
            index = self._free.get()
            self.frames[index], scene = encode_training_scene(seed, self.chunks, encoder)
            self._ready.put((index, scene))
            seed += workers

    def take(self, timeout: float) -> tuple[int, EncodedScene]:
        """The next scene, and the number of the buffer that holds its frames; give that back.

        Raises queue.Empty after `timeout` seconds.
        """
        scene: tuple[int, EncodedScene] = self._ready.get(timeout=timeout)
        return scene

    def give_back(self, index: int) -> None:
        """Let a buffer be written again."""
        self._free.put(index)

    def close(self) -> None:
        """Stop the workers."""
        for process in self._processes:
            process.terminate()


class ScenePool:
    """The newest scenes, on the training device; a thread copies them from the feed.

    A scene that is being streamed is not overwritten until it has been released.
    """

    def __init__(self, feed: SceneFeed, capacity: int, device: torch.device) -> None:
        self.feed, self.capacity, self.device = feed, capacity, device
        chunks = feed.chunks

        def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.frames = tensor(capacity, chunks, *_FRAME_SHAPE, dtype=torch.uint8)
        self.prefix = tensor(capacity, PREFIX_SLOTS, dtype=torch.int16)
        self.ids = tensor(capacity, chunks, SLOTS, dtype=torch.int16)
        self.targets = tensor(capacity, chunks, REPLY_LENGTH, dtype=torch.int16)
        self.weights = tensor(capacity, chunks, REPLY_LENGTH, dtype=torch.float32)
        self.cells = tensor(capacity, chunks, VISION_TOKENS, TARGETS, dtype=torch.int8)
        self.received = 0
        self._order: deque[int] = deque()  # filled places, oldest first
        self._in_use: set[int] = set()
        self._random = np.random.default_rng(0)
        self._lock = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._copy_scenes, daemon=True)
        self._thread.start()

    def acquire(self) -> int:
        """A random scene nobody streams; waits until there is one. Release it afterwards."""
        with self._lock:
            while len(self._order) <= len(self._in_use):
                self._lock.wait(1.0)
            while True:
                place = self._order[int(self._random.integers(len(self._order)))]
                if place not in self._in_use:
                    self._in_use.add(place)
                    return place

    def release(self, place: int) -> None:
        """Allow a scene to be overwritten."""
        with self._lock:
            self._in_use.discard(place)

    def wait_for(self, scenes: int) -> None:
        """Wait until so many scenes have arrived."""
        with self._lock:
            self._lock.wait_for(lambda: self.received >= scenes)

    def close(self) -> None:
        """Stop copying."""
        self._stopped = True
        self._thread.join()

    def _copy_scenes(self) -> None:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if on_gpu else None
        staging = torch.empty(self.frames.shape[1:], dtype=torch.uint8, pin_memory=on_gpu)
        while not self._stopped:
            try:
                index, scene = self.feed.take(timeout=0.5)
            except queue.Empty:
                continue
            staging.copy_(torch.from_numpy(self.feed.frames[index]))
            self.feed.give_back(index)
            place = self._place()
            with torch.cuda.stream(stream):
                self.frames[place].copy_(staging, non_blocking=True)
                self.prefix[place].copy_(torch.from_numpy(scene.prefix))
                self.ids[place].copy_(torch.from_numpy(scene.ids))
                self.targets[place].copy_(torch.from_numpy(scene.targets))
                self.weights[place].copy_(torch.from_numpy(scene.weights))
                self.cells[place].copy_(torch.from_numpy(scene.cells))
            if stream is not None:
                stream.synchronize()
            with self._lock:
                self._order.append(place)
                self.received += 1
                self._lock.notify_all()

    def _place(self) -> int:
        """An unfilled place, or else the oldest one that nobody streams."""
        with self._lock:
            if self.received < self.capacity:
                return self.received
            for place in self._order:
                if place not in self._in_use:
                    self._order.remove(place)
                    return place
        raise RuntimeError("Every scene of the pool is being streamed; make the pool larger.")
