"""The demo model: training's forward equals transformers', and the checkpoint sees and counts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration

from demo import forward
from demo.checkpoint import model_config, sizes_of
from demo.clip import clip_scene
from demo.render import render_chunks
from demo.segment import run_segment
from demo.streaming import Streamer, Window
from demo.tokenizer import write_tokenizer
from demo.trainer import initial_weights
from demo.turns import EMPTY, REPLY_LENGTH, REPLY_SLOTS, TurnEncoder
from demo.world import make_scene
from framesink.runtime.manifest import StreamingDefaults
from framesink.runtime.preprocess import PreprocessConfig, patchify
from framesink.runtime.protocol import ChatProtocol
from framesink.runtime.tokenizer import Tokenizer

CHUNKS = 5
MODEL = Path(__file__).parents[1] / "demo" / "model"


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


@pytest.fixture(scope="module")
def bundled() -> Qwen2_5_VLForConditionalGeneration:
    """The bundled checkpoint in transformers, computed in float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        MODEL, dtype=torch.float32, local_files_only=True
    ).eval()


def test_the_checkpoint_is_small_and_whole(bundled: Qwen2_5_VLForConditionalGeneration) -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 16_000_000
    with safe_open(MODEL / "model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}  # noqa: SIM118
    # A configuration that the weights were not trained with would load as well.
    tokenizer = Tokenizer.from_directory(MODEL)
    expected = model_config(tokenizer).to_dict()
    stored_config = bundled.config.to_dict()
    for part in ("text_config", "vision_config"):
        for key in ("rope_parameters", "hidden_size", "vocab_size", "fullatt_block_indexes"):
            assert stored_config[part].get(key) == expected[part].get(key)
    defaults = StreamingDefaults(**json.loads((MODEL / "streaming_config.json").read_text()))
    assert Window() == Window(defaults.reply_turns, defaults.sink_text, defaults.recent_text)


def test_transformers_reads_the_clip_right(bundled: Qwen2_5_VLForConditionalGeneration) -> None:
    """The first chunks of the held-out clip in one plain forward of transformers: after every
    prompt and every right word, the most likely token is the next right one."""
    encoder = TurnEncoder(ChatProtocol(Tokenizer.from_directory(MODEL)))
    scene = clip_scene()
    chunks = Window().turns
    ids = np.stack([encoder.turn(scene.truth[i], float(i), first=i == 0) for i in range(chunks)])
    prefix = encoder.prefix("Say what happens.")
    joined = np.concatenate([prefix, ids.reshape(-1)])
    tokens = torch.from_numpy(joined[joined != EMPTY]).long()[None]
    frames = render_chunks(scene, drawn_at=336)[:chunks]
    patches = [
        patchify(chunk, PreprocessConfig(min_pixels=112 * 112, max_pixels=112 * 112))[0]
        for chunk in frames
    ]
    with torch.no_grad():
        likeliest = (
            bundled(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values_videos=torch.from_numpy(np.concatenate(patches)),
                video_grid_thw=torch.tensor([[1, 8, 8]] * chunks),
                mm_token_type_ids=(tokens == bundled.config.video_token_id).int() * 2,
            )
            .logits[0]
            .argmax(-1)
        )
    end = int((prefix != EMPTY).sum())
    said = []
    for turn in ids:
        count = int((turn[REPLY_SLOTS] != EMPTY).sum())
        end += int((turn != EMPTY).sum())
        said.append(encoder.protocol.tokenizer.decode(likeliest[end - count : end].tolist()))
    assert said == [f"{truth.reply} ..." for truth in scene.truth[:chunks]]
    assert sum(bool(truth.reply) for truth in scene.truth[:chunks]) >= 4
