"""Time per chunk of one session."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise

from framesink.bench.floors import ChunkFloor, ChunkShape, GpuRates, chunk_floor
from framesink.bench.measure import ChunkResult, Quantiles, TimedSession, resident_bytes
from framesink.bench.precisions import Precisions
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.policies import Policy
from framesink.runtime.preprocess import frame_grid, resize_frames
from framesink.runtime.video.chunk import Chunk


@dataclass(frozen=True, slots=True)
class GpuTimes:
    """What the GPU worked on one chunk: its vision encoder, its prompt, and each of its decode
    steps; seconds."""

    vision: Quantiles
    prefill: Quantiles
    decode_step: Quantiles


@dataclass(frozen=True, slots=True)
class ChunkReport:
    """Times are seconds; `fps` is frames per second of wall time, `realtime_factor` seconds of
    video per second of wall time; `resident` is bytes at the end. `prompt_tokens` come with a
    chunk. `gpu` is there where a GPU runs the model, `floor` where its rates are known too."""

    executor: str
    chunks: int
    warmup: int
    frame_size: tuple[int, int]
    chunk: Quantiles
    ttft: Quantiles
    itl: Quantiles
    gpu: GpuTimes | None
    floor: ChunkFloor | None
    fps: float
    realtime_factor: float
    tokens_per_chunk: float
    prompt_tokens: float
    context_tokens: int
    pages_used: int
    pages_total: int
    resident: int


def measure_chunks(
    engine: StreamingEngine,
    source: Iterator[Chunk],
    *,
    chunks: int,
    warmup: int,
    policy: Policy | None = None,
    max_new_tokens: int | None = None,
    previous_text: str = "",
    gpu: tuple[GpuRates, Precisions] | None = None,
) -> ChunkReport:
    """Run `warmup` chunks, then measure `chunks`; both at least 1.

    `previous_text` is what the session begins with. `gpu` are the rates of the GPU that runs the
    model, and what that is held in.
    """
    with engine.open_session(
        policy, max_new_tokens=max_new_tokens, previous_text=previous_text
    ) as session:
        timed = TimedSession(session)
        video_seconds = 0.0
        results: list[ChunkResult] = []
        for chunk in islice(source, warmup):
            timed.run(chunk)
        before = engine.stats()
        worked = [before.gpu_seconds]
        for chunk in islice(source, chunks):
            results.append(timed.run(chunk))
            worked.append(engine.stats().gpu_seconds)
            video_seconds += chunk.t1 - chunk.t0
        session_stats, engine_stats = session.stats(), engine.stats()
        resident = resident_bytes()
    frames = resize_frames(chunk.frames, engine.preprocess)
    seconds = [result.seconds for result in results]
    steps = sum(len(result.tokens) - 1 for result in results) / len(results)
    prompt = (engine_stats.tokens - before.tokens) / len(results) - steps
    floor = None
    if gpu is not None:
        rates, precisions = gpu
        shape = ChunkShape(
            grid=frame_grid(frames, engine.preprocess),
            prompt=round(prompt),
            context=round(session_stats.context_tokens - prompt - steps),
            steps=steps,
        )
        floor = chunk_floor(engine.model, precisions, rates, shape)
    return ChunkReport(
        executor=engine.executor_reason,
        chunks=len(results),
        warmup=warmup,
        frame_size=(chunk.frames.shape[1], chunk.frames.shape[2]),
        chunk=Quantiles.of(seconds),
        ttft=Quantiles.of([result.ttft for result in results if result.ttft is not None]),
        itl=Quantiles.of([gap for result in results for gap in result.itl]),
        gpu=_gpu_times(worked, results),
        floor=floor,
        fps=sum(result.frames for result in results) / sum(seconds),
        realtime_factor=video_seconds / sum(seconds),
        tokens_per_chunk=sum(len(result.tokens) for result in results) / len(results),
        prompt_tokens=prompt,
        context_tokens=session_stats.context_tokens,
        pages_used=engine_stats.pages_used,
        pages_total=engine_stats.pages_total,
        resident=resident,
    )


def _gpu_times(worked: list[Mapping[str, float]], results: list[ChunkResult]) -> GpuTimes | None:
    """From the GPU's seconds so far before the first chunk and after each."""
    if not worked[-1]:
        return None

    def spent(name: str) -> list[float]:
        return [after.get(name, 0.0) - before.get(name, 0.0) for before, after in pairwise(worked)]

    steps = zip(spent("decode"), results, strict=True)
    return GpuTimes(
        vision=Quantiles.of(spent("vision")),
        prefill=Quantiles.of(spent("prefill")),
        decode_step=Quantiles.of(
            [
                seconds / (len(result.tokens) - 1)
                for seconds, result in steps
                if len(result.tokens) > 1
            ]
        ),
    )
