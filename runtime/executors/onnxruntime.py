"""The embedded executor: ONNX Runtime on the CPU, pages in host memory.

It runs the bundle's graphs as they are. New K/V rows come out of the graph and are written into
the pages here, which the next run reads in place.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import onnxruntime
import psutil

from framesink.runtime.arrays import AnyArray, Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.errors import CapacityError
from framesink.runtime.executors.base import SequenceInput
from framesink.runtime.executors.batching import PaddedGroup, group_by_size, pad_group
from framesink.runtime.executors.embedding import find_embedding
from framesink.runtime.executors.onnx_graph import GraphInMemory, input_dtype, load_graph
from framesink.runtime.executors.onnx_vision import OnnxVisionEncoder
from framesink.runtime.models.config import ModelConfig
from framesink.runtime.preprocess import Grid
from framesink.runtime.rope import MRopeTable


class OnnxRuntimeExecutor:
    """Runs both graphs on the CPU. See `framesink.runtime.executors.base.Executor`."""

    name = "onnxruntime"

    def __init__(
        self,
        config: ModelConfig,
        *,
        language_model: Path | GraphInMemory,
        vision_encoder: Path,
        embedding: AnyArray,
        num_pages: int,
        threads: int | None = None,
    ) -> None:
        """Load two ONNX graphs. `embedding` is the token embedding `[vocab, hidden]` of any float
        type; `threads` is how many threads an operator may use (None: one per physical core).

        Raises BundleError for a graph that does not load, CapacityError if the pages do not fit
        into memory.
        """
        self.num_pages = num_pages
        self._config = config
        self._embedding = embedding
        self._language_model = load_graph(language_model, threads)
        self._vision = OnnxVisionEncoder(config, vision_encoder, threads=threads)
        self._outputs = [output.name for output in self._language_model.get_outputs()]
        self._dtype = input_dtype(self._language_model, "inputs_embeds")
        self._pools = _allocate_pools(self._language_model, num_pages)
        self.page_size = self._pools["k_pages.0"].shape[2]
        self._rope = MRopeTable(config.text, self._dtype)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        *,
        num_pages: int,
        threads: int | None = None,
        language_model: GraphInMemory | None = None,
    ) -> Self:
        """Load a bundle's executed graphs, or another `language_model` over the same weights.

        Raises BundleError and CapacityError as the constructor does, and BundleError if the token
        embedding is not among the weights.
        """
        manifest = bundle.manifest
        return cls(
            manifest.model,
            language_model=language_model or bundle.path(manifest.language_model.executed.path),
            vision_encoder=bundle.path(manifest.vision_encoder.executed.path),
            embedding=find_embedding(bundle),
            num_pages=num_pages,
            threads=threads,
        )

    @property
    def pages(self) -> Mapping[str, AnyArray]:
        """The pages `[N, Hkv, page, D]` of every layer's K and V, by graph input; what is written
        into them is read by the next step."""
        return self._pools

    def encode_vision(self, patches: Float32Array, grid: Grid) -> Float32Array:
        """See `OnnxVisionEncoder`."""
        return self._vision.encode_vision(patches, grid)

    def step(self, batch: Sequence[SequenceInput]) -> list[Float32Array | None]:
        """Run one in-flight batch, in groups of like size; see `Executor.step`."""
        results: list[Float32Array | None] = [None] * len(batch)
        for members in group_by_size(batch, self.page_size):
            group = pad_group(batch, members, self.page_size)
            logits = self._run(group, [batch[place] for place in members])
            for place, row in zip(members, logits, strict=True):
                if batch[place].needs_logits:
                    results[place] = row
        return results

    def _run(self, group: PaddedGroup, sequences: Sequence[SequenceInput]) -> Float32Array:
        cos_context, sin_context = self._rope.lookup(group.context_positions)
        cos_new, sin_new = self._rope.lookup(group.new_positions)
        feeds = {
            "inputs_embeds": self._embed(group, sequences),
            "cos_new": cos_new,
            "sin_new": sin_new,
            "cos_ctx": cos_context,
            "sin_ctx": sin_context,
            "mask": group.mask(self._dtype),
            "block_table": group.block_table,
            "last": group.last,
        }
        outputs = dict(
            zip(
                self._outputs,
                self._language_model.run(self._outputs, {**feeds, **self._pools}),
                strict=True,
            )
        )
        self._write_rows(group, outputs)
        return np.asarray(outputs["logits"], np.float32)

    def _embed(self, group: PaddedGroup, sequences: Sequence[SequenceInput]) -> AnyArray:
        """Embeddings `[B, s, hidden]` of the new tokens, vision embeddings in their places."""
        count, new = group.new_positions.shape[1:]
        embeds = np.zeros((count, new, self._config.text.hidden_size), self._dtype)
        for row, sequence in enumerate(sequences):
            tokens = sequence.token_ids
            embeds[row, : len(tokens)] = self._embedding[tokens]
            if sequence.vision_embeddings is not None:
                places = np.flatnonzero(tokens == self._config.video_token_id)
                embeds[row, places] = sequence.vision_embeddings
        return embeds

    def _write_rows(self, group: PaddedGroup, outputs: Mapping[str, AnyArray]) -> None:
        """Put the new K/V rows into their slots, in every layer's pages."""
        page, row = np.divmod(group.slots, self.page_size)
        sequence, token = group.rows
        for name, pool in self._pools.items():
            new = outputs[name.replace("_pages.", "_new.")]
            # FP8 rows come as bytes of uint8, and FP8 pages are the same bytes typed int8.
            pool[page, :, row] = new[sequence, :, token].view(pool.dtype)

    def close(self) -> None:
        """Free weights and pages."""
        self._vision.close()
        del self._language_model
        self._pools.clear()


def _allocate_pools(session: onnxruntime.InferenceSession, num_pages: int) -> dict[str, AnyArray]:
    """Zeroed pages `[N, Hkv, page, D]` of every layer's K and V, by input name."""
    layers = [value for value in session.get_inputs() if "_pages." in value.name]
    shapes = {value.name: (num_pages, *value.shape[1:]) for value in layers}
    dtypes = {value.name: input_dtype(session, value.name) for value in layers}
    needed = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes)
    available = psutil.virtual_memory().available
    if needed > available:
        raise CapacityError(
            f"{num_pages} pages need {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB "
            "are available; ask for fewer sessions or a shorter context."
        )
    return {name: np.zeros(shapes[name], dtypes[name]) for name in shapes}
