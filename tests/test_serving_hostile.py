"""Ten thousand hostile requests on the real server, beside sessions that must not notice."""

import itertools
import math
import re
import statistics
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

pytest.importorskip("pytriton", reason="the server's wheel is not installed")
from reference.hostile_attacks import ROADS, hostile_requests
from reference.hostile_calls import bad_reply
from reference.hostile_chunks import bad_patches
from reference.hostile_requests import Attack, Attacker, strings
from reference.prometheus import wait_for_metrics
from serving_server import RunningServer
from tritonclient.grpc import InferResult
from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from framesink.client import SessionSettings, connect
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.source import open_source
from framesink.serving import contract

CLIP = Path(__file__).parents[1] / "demo" / "clip.mp4"
ATTACKS, ATTACKERS = 10_000, 4
# So many attacks come before memory is looked at: libraries fill their pools first. (tritonserver's
# own were full, at 115 MB, after 30,000.)
WARM_UP = ATTACKS // 4
# What a process may hold more in the second half of the run than in the first: to keep 8 kB of each
# attack would be more.
MEMORY_GROWTH = 24 << 20
STARTS, SERVED_CHUNKS = 200, 8
PATIENCE = 60.0
LIVE, RESERVED = "framesink_sessions", 'framesink_kv_pages{state="reserved"}'
MODELS = (
    contract.PREPROCESS,
    contract.VISION_ENCODER,
    contract.LANGUAGE_MODEL,
    contract.POSTPROCESS,
)


@cache
def clip() -> list[Chunk]:
    with ChunkStream(open_source(CLIP), realtime=False) as chunks:
        return list(chunks)


def endless_clip() -> Iterator[Chunk]:
    """The clip again and again, each time later."""
    for chunk_number in itertools.count():
        chunk = clip()[chunk_number % len(clip())]
        later = chunk_number // len(clip()) * len(clip())
        yield replace(
            chunk,
            t0=chunk.t0 + later,
            t1=chunk.t1 + later,
            timestamps=tuple(second + later for second in chunk.timestamps),
        )


class Bystander:
    """A well-behaved session, a chunk every now and then, in a thread of its own."""

    def __init__(self, server: RunningServer, road: str) -> None:
        self.chunks = 0
        self._server, self._road = server, road
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(1)
        self._heard = self._threads.submit(self._run)

    def _run(self) -> list[tuple[Any, ...]]:
        settings = SessionSettings(model=self._road, frame_format="png", reconnect_seconds=0)
        with (
            connect(self._server.url, timeout=PATIENCE) as client,
            client.session(settings=settings) as session,
        ):
            heard = []
            for chunk in endless_clip():
                heard += exchange(session, iter(session), chunk)
                self.chunks += 1
                if self._stopping.wait(0.25):
                    return heard
        raise AssertionError

    def finish(self) -> list[tuple[Any, ...]]:
        """All it heard."""
        self._stopping.set()
        return self._heard.result(PATIENCE)


def exchange(session: Any, events: Iterator[Any], chunk: Chunk) -> list[tuple[Any, ...]]:
    """The events that answer a chunk."""
    session.push_chunk(chunk)
    heard = []
    for event in events:
        heard.append((event.turn, event.kind, event.text, event.words, event.tokens, event.final))
        if event.final:
            return heard
    raise AssertionError(heard)


def said_locally(bundle: Path, chunks: int) -> list[tuple[Any, ...]]:
    """What the local runtime answers to the first chunks."""
    with StreamingEngine.load(bundle, max_sessions=1, threads=1) as engine:
        session = engine.open_session()
        events = iter(session)
        pieces = itertools.islice(endless_clip(), chunks)
        return list(itertools.chain(*(exchange(session, events, piece) for piece in pieces)))


def answer(service: GRPCInferenceServiceStub, attack: Attack, *, header: bool) -> str | None:
    """The sentence that refuses an attack, None if nothing does. One stream each: Triton 2.51 does
    not survive some pairs of refusals on one."""
    metadata = ((contract.STATUS_HEADER, "true"),) if header else None
    sentences = []
    requests = iter([attack.message])
    try:
        for message in service.ModelStreamInfer(requests, metadata=metadata, timeout=PATIENCE):
            sentences.append(message.error_message or refusal_in(message.infer_response))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:  # the server is gone
            raise
        return f"{error.code()} {error.details()}"
    assert sentences, "no answer at all"
    return "\n".join(filter(None, sentences)) or None


def refusal_in(response: ModelInferResponse) -> str:
    """What an event of kind error says, or what `preprocess` has the language model say."""
    values = {
        tensor.name: InferResult(response).as_numpy(tensor.name) for tensor in response.outputs
    }
    refusals = values.get("REFUSAL", values["TEXT"] if values.get("KIND") == [b"error"] else [])
    return b"".join(refusals).decode()


def is_right(attack: Attack, sentence: str | None) -> bool:
    if sentence is None:
        return attack.refusal is None or not attack.sure
    return attack.refusal is not None and re.search(attack.refusal, sentence) is not None


@dataclass
class Outcome:
    """What came of all attacks: how many of each name, and those not answered as they should be."""

    names: Counter[str]
    wrong: list[str]


class Assault:
    """Attackers side by side, each with its own connection and seed."""

    def __init__(self, server: RunningServer) -> None:
        self.outcome = Outcome(Counter(), [])
        self.count = 0
        self._server = server
        self._threads = ThreadPoolExecutor(ATTACKERS)
        self._running = [self._threads.submit(self._run, seed) for seed in range(ATTACKERS)]

    @property
    def over(self) -> bool:
        return all(attacker.done() for attacker in self._running)

    def finish(self) -> Outcome:
        for attacker in self._running:
            attacker.result()
        return self.outcome

    def _run(self, seed: int) -> None:
        options = (("framesink.attacker", seed),)  # or else they would share a connection
        with grpc.insecure_channel(self._server.url, options) as channel:
            service = GRPCInferenceServiceStub(channel)
            attacks = hostile_requests(seed)
            for number in itertools.count():
                attack = next(attacks)
                # In the middle of sessions: the hostile part may not end with their last requests.
                if number >= ATTACKS / ATTACKERS and attack.name == "open":
                    return
                self._send(service, attack, number)

    def _send(self, service: GRPCInferenceServiceStub, attack: Attack, number: int) -> None:
        if attack.droppable and number % 16 == 0:
            service.ModelStreamInfer(iter([attack.message])).cancel()
            self.outcome.names["dropped"] += 1
        header = attack.header and number % 3 == 0
        sentence = answer(service, attack, header=header)
        self.outcome.names[attack.name] += 1
        self.count += 1
        if not is_right(attack, sentence):
            self.outcome.wrong.append(f"{attack.name}: {sentence!r}, not {attack.refusal!r}")


def private_memory(server: RunningServer) -> dict[str, int]:
    """Bytes that the server and the processes of its models hold for themselves alone.

    What Triton shares between them lies in pools that grow by leaps, and never shrink.
    """
    processes = {name: server.model_process(name) for name in MODELS}
    tritonserver = processes[contract.LANGUAGE_MODEL].parent()
    assert tritonserver is not None
    processes["tritonserver"] = tritonserver
    return {name: _anonymous_bytes(process.pid) for name, process in processes.items()}


def _anonymous_bytes(process: int) -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert match is not None
    return int(match[1]) << 10


def assert_flat(memory: list[tuple[int, dict[str, int]]]) -> None:
    """No process holds more in the second half of what was seen after warming up."""
    seen = [sizes for count, sizes in memory if count >= WARM_UP]
    middle = len(seen) // 2
    for name in seen[0]:
        first, second = (
            statistics.median(sizes[name] for sizes in half)
            for half in (seen[:middle], seen[middle:])
        )
        assert second - first < MEMORY_GROWTH, (name, first, second)


def test_ten_thousand_hostile_requests_cost_nobody_anything(
    demo_server: RunningServer, demo_bundle: Path
) -> None:
    wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 0, PATIENCE)
    before = {name: demo_server.model_process(name).pid for name in MODELS}
    bystanders = [Bystander(demo_server, road) for road in ROADS]
    held = wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 2, PATIENCE)
    assault = Assault(demo_server)
    memory: list[tuple[int, dict[str, int]]] = []
    while not assault.over:
        memory.append((assault.count, private_memory(demo_server)))
        threading.Event().wait(0.5)
    outcome = assault.finish()

    assert outcome.wrong == []
    assert sum(outcome.names.values()) >= ATTACKS
    assert min(outcome.names.values()) >= ATTACKS / 200, outcome.names
    # All that the attackers opened is given back; the bystanders' own pages are still held.
    after = wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 2, PATIENCE)
    assert after[RESERVED] == held[RESERVED] > 0
    for bystander in bystanders:
        heard = bystander.finish()
        assert heard == said_locally(demo_bundle, heard[-1][0] + 1)
    last = wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 0, PATIENCE)
    assert last[RESERVED] == 0

    assert demo_server.ready()
    assert {name: demo_server.model_process(name).pid for name in MODELS} == before
    assert_flat(memory)


def test_a_flood_of_starts_leaves_room_for_who_was_there(
    demo_server: RunningServer, demo_bundle: Path
) -> None:
    """All sessions are taken, the rest is told so, and they come back when they are idle."""
    wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 0, PATIENCE)
    bystander = Bystander(demo_server, contract.LANGUAGE_MODEL)
    wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 1, PATIENCE)
    attacker = Attacker(np.random.default_rng(5), contract.LANGUAGE_MODEL, 0)
    starts = [
        attacker.attack("start", None, sequence_id=attacker.new_number(), sequence_start=True)
        for _ in range(STARTS)
    ]
    with (
        grpc.insecure_channel(demo_server.url) as channel,
        ThreadPoolExecutor(16) as threads,
    ):
        service = GRPCInferenceServiceStub(channel)
        answers = list(threads.map(lambda start: answer(service, start, header=False), starts))
    most = demo_server.options.max_sessions
    assert most is not None
    # Those opened first may be idle for long enough before the last ones come.
    assert answers.count(None) >= most - 1
    full = f"{most} sessions are open, the most this server serves at once; try again later."
    refused = {sentence for sentence in answers if sentence is not None}
    assert refused == {f"{full} [UNAVAILABLE]"}
    wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 1, PATIENCE)
    heard = bystander.finish()
    assert heard == said_locally(demo_bundle, heard[-1][0] + 1)


def test_the_largest_chunks_as_fast_as_they_go_starve_nobody(
    demo_server: RunningServer, demo_bundle: Path
) -> None:
    """Frames of the most pixels the server takes; a session beside them is served all the time."""
    wait_for_metrics(demo_server.metrics_url, lambda now: now[LIVE] == 0, PATIENCE)
    side = math.isqrt(demo_server.options.max_frame_pixels)
    file = cv2.imencode(".jpg", np.zeros((side, side, 3), np.uint8))[1].tobytes()
    attacker = Attacker(np.random.default_rng(6), contract.LANGUAGE_MODEL, 1 << 50)
    opening = attacker.attack("open", None, sequence_start=True).message
    chunk = attacker.attack("chunk", None, strings("FRAMES", file, file)).message
    places = threading.Semaphore(demo_server.options.max_pending_chunks)
    stopping = threading.Event()

    def flood() -> Iterator[ModelInferRequest]:
        yield opening
        while not stopping.is_set() and places.acquire(timeout=PATIENCE):
            yield chunk

    def answered_chunks() -> int:
        with grpc.insecure_channel(demo_server.url) as channel:
            chunks = 0
            for message in GRPCInferenceServiceStub(channel).ModelStreamInfer(flood()):
                assert message.error_message == ""
                outputs = message.infer_response.outputs
                if outputs and InferResult(message.infer_response).as_numpy("FINAL")[0]:
                    chunks += 1
                    places.release()
            return chunks

    with ThreadPoolExecutor(1) as thread:
        flooding = thread.submit(answered_chunks)
        bystander = Bystander(demo_server, contract.LANGUAGE_MODEL)
        while bystander.chunks < SERVED_CHUNKS and not flooding.done():
            threading.Event().wait(0.1)
        stopping.set()
        heard = bystander.finish()
        assert flooding.result(PATIENCE) >= SERVED_CHUNKS
    assert heard == said_locally(demo_bundle, heard[-1][0] + 1)


def test_single_calls_are_refused_by_their_status(demo_server: RunningServer) -> None:
    attacker = Attacker(np.random.default_rng(7), contract.LANGUAGE_MODEL, 1 << 51)
    embeddings, no_reply = bad_patches(attacker), bad_reply(attacker)
    start = attacker.attack("start", None, sequence_start=True)
    assert embeddings.refusal is not None
    assert no_reply.refusal is not None
    expected = (
        (embeddings, grpc.StatusCode.INVALID_ARGUMENT, embeddings.refusal),
        (no_reply, grpc.StatusCode.INVALID_ARGUMENT, no_reply.refusal),
        (start, grpc.StatusCode.UNIMPLEMENTED, "doesn't support models with decoupled"),
        (attacker.stray("no model", None, "nothing"), grpc.StatusCode.NOT_FOUND, "unknown model"),
    )
    with grpc.insecure_channel(demo_server.url) as channel:
        service = GRPCInferenceServiceStub(channel)
        for attack, code, sentence in expected:
            with pytest.raises(grpc.RpcError) as refused:
                service.ModelInfer(attack.message, timeout=PATIENCE)
            assert refused.value.code() is code
            assert re.search(sentence, refused.value.details())
