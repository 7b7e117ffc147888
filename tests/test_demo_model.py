"""The fast forward of the demo's training equals transformers, vision and language."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from demo import forward
from demo.checkpoint import model_config
from demo.render import render_chunks
from demo.segment import run_segment
from demo.streaming import Streamer, Window
from demo.tokenizer import write_tokenizer
from demo.train import initial_weights, sizes_of
from demo.turns import EMPTY, REPLY_LENGTH, REPLY_SLOTS, TurnEncoder
from demo.world import make_scene
from framesink.runtime.preprocess import PreprocessConfig, patchify
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

CHUNKS = 5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TurnEncoder:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return TurnEncoder(ChatProtocol(Tokenizer.from_directory(directory)))


def test_streamed_turns_equal_one_transformers_forward(encoder: TurnEncoder) -> None:
    """Before anything is evicted, chunk-by-chunk streaming is one causal forward."""
    scene = make_scene(3, CHUNKS, event_rate=0.7, question_rate=1.0)
    frames = render_chunks(scene)
    ids, _, _ = encoder.scene(scene, start=8.0)
    prefix_ids = encoder.prefix("Say what happens.")
    config = model_config(encoder.protocol.tokenizer)
    sizes = sizes_of(config)
    weights = initial_weights(config, seed=1)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.load_state_dict({**weights, "lm_head.weight": weights[forward.EMBEDDING]})

    joined = np.concatenate([prefix_ids, ids.reshape(-1)])
    tokens = torch.from_numpy(joined[joined != EMPTY]).long()[None]
    patches = [
        patchify(chunk, PreprocessConfig(min_pixels=112 * 112, max_pixels=112 * 112))[0]
        for chunk in frames
    ]
    is_video = tokens == config.video_token_id
    with torch.no_grad():
        expected = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values_videos=torch.from_numpy(np.concatenate(patches)),
            video_grid_thw=torch.tensor([[1, 8, 8]] * CHUNKS),
            mm_token_type_ids=is_video.int() * 2,
        ).logits[0]

        streamer = Streamer(sizes, Window(), torch.device("cpu"))
        prefix = streamer.prefix(weights, torch.from_numpy(prefix_ids).long()[None])
        state = streamer.empty_state(1, torch.float32)
        vision = forward.encode_vision(weights, sizes, forward.to_patches(torch.from_numpy(frames)))
        streamed = []
        for index in range(CHUNKS):
            turn_ids = torch.from_numpy(ids[index]).long()[None]
            retained = streamer.context(prefix, state)
            hidden, turn = streamer.turn(weights, retained, turn_ids, vision[index : index + 1])
            streamed.append(forward.logits(weights, sizes, hidden[0]))
            state = streamer.advance(state, turn)

    ends = np.cumsum((ids != EMPTY).sum(1)) + (prefix_ids != EMPTY).sum()
    for index in range(CHUNKS):
        kept = ids[index][REPLY_SLOTS] != EMPTY
        count = int(kept.sum())
        end = int(ends[index])
        torch.testing.assert_close(
            streamed[index][torch.from_numpy(kept)],
            expected[end - count : end],
            rtol=1e-4,
            atol=1e-4,
        )
        assert count <= REPLY_LENGTH


def test_parallel_run_equals_stepping(encoder: TurnEncoder) -> None:
    """Training's parallel run of turns gives what stepping gives, through evictions and moves."""
    window = Window(turns=3, sink_text=16, recent_text=48)
    scenes = [make_scene(seed, 13, event_rate=0.6, question_rate=0.5) for seed in (5, 6)]
    ids = torch.from_numpy(np.stack([encoder.scene(scene, 95.0)[0] for scene in scenes])).long()
    queries = [encoder.prefix("Say what happens."), encoder.prefix(None)]
    prefix_ids = torch.from_numpy(np.stack(queries)).long()
    config = model_config(encoder.protocol.tokenizer)
    sizes = sizes_of(config)
    weights = initial_weights(config, seed=2)
    # Larger scores than at the start of training, so that what is seen matters.
    weights = {name: value * (3 if "q_proj" in name else 1) for name, value in weights.items()}
    vision = torch.randn(2, 13, 16, 256, generator=torch.Generator().manual_seed(0))
    streamer = Streamer(sizes, window, torch.device("cpu"))
    with torch.no_grad():
        prefix = streamer.prefix(weights, prefix_ids)
        state = streamer.empty_state(2, torch.float32)
        stepped = []
        for index in range(13):
            retained = streamer.context(prefix, state)
            hidden, turn = streamer.turn(weights, retained, ids[:, index], vision[:, index])
            stepped.append(hidden)
            state = streamer.advance(state, turn)
        parallel_state = streamer.empty_state(2, torch.float32)
        parts = []
        for part in (slice(0, 4), slice(4, 13)):
            hidden, parallel_state = run_segment(
                streamer, weights, prefix, parallel_state, ids[:, part], vision[:, part]
            )
            parts.append(hidden)
    kept = (ids != EMPTY)[:, :, REPLY_SLOTS]
    parallel = torch.cat(parts, dim=1)[kept]
    torch.testing.assert_close(parallel, torch.stack(stepped, dim=1)[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(parallel_state.text_count, state.text_count)
    assert int(state.text_count.max()) > 20
