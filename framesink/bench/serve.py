"""What a server adds to the local runtime: to the first token and to every further one."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np

from framesink.bench.measure import Quantiles
from framesink.client import Client, SessionSettings, connect
from framesink.client.client import SessionParameters
from framesink.client.frames import FrameFormat, compress
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.errors import FramesinkError
from framesink.runtime.events import Event, EventKind
from framesink.runtime.session_plan import default_policy
from framesink.runtime.video.chunk import Chunk
from framesink.serving.contract import LANGUAGE_MODEL, STREAMING_VLM
from framesink.serving.endpoints import free_ports
from framesink.serving.options import ServeOptions
from framesink.serving.supervisor import Supervisor

ROADS = {"direct": LANGUAGE_MODEL, "ensemble": STREAMING_VLM}


@dataclass(frozen=True, slots=True)
class RoadTimes:
    """Seconds, as a caller sees them. `first`: from handing a chunk over to the first event of its
    reply; `token`: from there to the reply's end, per further token, of replies that come in
    several events; `reply`: from handing a chunk over to the reply's end."""

    first: Quantiles
    token: Quantiles
    reply: Quantiles


@dataclass(frozen=True, slots=True)
class ServeReport:
    """`local` is the runtime in this process, `roads` those of the server, `overhead` what each
    adds to it: the difference of the same chunk both ways. `same_tokens` counts the chunks whose
    tokens are those of the local runtime."""

    executor: str
    chunks: int
    warmup: int
    frame_size: tuple[int, int]
    frame_format: str
    local: RoadTimes
    roads: dict[str, RoadTimes]
    overhead: dict[str, RoadTimes]
    same_tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Reply:
    first: float
    rest: float
    events: int
    tokens: tuple[int, ...]

    @property
    def per_token(self) -> float | None:
        return self.rest / (len(self.tokens) - 1) if self.events > 1 else None

    @property
    def total(self) -> float:
        return self.first + self.rest


class _Session(Protocol):
    def push_chunk(self, chunk: Chunk) -> None: ...

    def __iter__(self) -> Iterator[Event]: ...


@contextmanager
def serving(bundle: Path, executor: str, threads: int | None) -> Iterator[Client]:
    """A client of a server of `bundle`, started on free ports with room for what is measured.

    Raises ServerError where it does not start.
    """
    grpc_port, http_port, metrics_port = free_ports(3)
    options = ServeOptions(
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        executor=executor,
        threads=threads,
        max_sessions=len(ROADS),
        admission="none",
        ladder="none",
    )
    with Supervisor(bundle, options), connect(f"grpc://127.0.0.1:{grpc_port}") as client:
        yield client


def measure_serving(
    engine: StreamingEngine,
    client: Client,
    source: Iterator[Chunk],
    *,
    chunks: int,
    warmup: int,
    frame_format: FrameFormat,
    windows: Mapping[str, Any],
    max_new_tokens: int | None = None,
) -> ServeReport:
    """Run the same chunks through the engine here and the server's roads, in turn, chunk by chunk,
    so that whatever else the machine does meets all of them alike.

    `windows` are parts of the policy in place of the bundle's (see SinkWindow). The local runtime
    is given the pixels that the server gets. Raises what `Client.session` and
    `StreamingEngine.open_session` raise, FramesinkError if a session fails.
    """
    settings = SessionSettings(frame_format=frame_format)
    parameters = cast(SessionParameters, dict(windows))
    if max_new_tokens is not None:
        parameters["max_new_tokens"] = max_new_tokens
    policy = replace(default_policy(engine.defaults), **windows)
    with ExitStack() as stack:
        sessions: dict[str, _Session] = {
            "local": stack.enter_context(engine.open_session(policy, max_new_tokens=max_new_tokens))
        }
        for road, model in ROADS.items():
            sessions[road] = stack.enter_context(
                client.session(settings=replace(settings, model=model), **parameters)
            )
        events = {name: iter(session) for name, session in sessions.items()}
        replies: dict[str, list[_Reply]] = {name: [] for name in sessions}
        names = list(sessions)
        size = (0, 0)
        for number, chunk in enumerate(islice(source, warmup + chunks)):
            size = (chunk.frames.shape[1], chunk.frames.shape[2])
            # The next chunk is read while the first of them works: none is always the first.
            first = number % len(names)
            for name in names[first:] + names[:first]:
                sent = _as_received(chunk, settings) if name == "local" else chunk
                reply = _run(sessions[name], events[name], sent)
                if number >= warmup:
                    replies[name].append(reply)
    local = replies.pop("local")
    return ServeReport(
        executor=engine.executor_reason,
        chunks=len(local),
        warmup=warmup,
        frame_size=size,
        frame_format=settings.frame_format,
        local=_times(local),
        roads={road: _times(run) for road, run in replies.items()},
        overhead={road: _differences(run, local) for road, run in replies.items()},
        same_tokens=_same_tokens(replies, local),
    )


def _run(session: _Session, events: Iterator[Event], chunk: Chunk) -> _Reply:
    started = time.perf_counter()
    session.push_chunk(chunk)
    first, count = None, 0
    for event in events:
        if event.kind is EventKind.ERROR:
            raise FramesinkError(event.text)
        if event.kind is EventKind.DEGRADED:
            continue
        now = time.perf_counter()
        first = now if first is None else first
        count += 1
        if event.final:
            return _Reply(first - started, now - first, count, event.tokens)
    raise FramesinkError("A session ended before it replied to a chunk; run the bench again.")


def _as_received(chunk: Chunk, settings: SessionSettings) -> Chunk:
    if settings.frame_format != "jpeg":
        return chunk
    files = compress(chunk.frames, "jpeg", settings.quality)
    images = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) for file in files]
    return replace(
        chunk, frames=np.stack([cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in images])
    )


def _times(replies: list[_Reply]) -> RoadTimes:
    return RoadTimes(
        first=Quantiles.of([reply.first for reply in replies]),
        token=Quantiles.of([t for reply in replies if (t := reply.per_token) is not None]),
        reply=Quantiles.of([reply.total for reply in replies]),
    )


def _differences(replies: list[_Reply], local: list[_Reply]) -> RoadTimes:
    pairs = list(zip(replies, local, strict=True))
    return RoadTimes(
        first=Quantiles.of([one.first - other.first for one, other in pairs]),
        token=Quantiles.of(
            [
                here - there
                for one, other in pairs
                if (here := one.per_token) is not None and (there := other.per_token) is not None
            ]
        ),
        reply=Quantiles.of([one.total - other.total for one, other in pairs]),
    )


def _same_tokens(replies: Mapping[str, list[_Reply]], local: list[_Reply]) -> dict[str, int]:
    return {
        road: sum(one.tokens == other.tokens for one, other in zip(run, local, strict=True))
        for road, run in replies.items()
    }
