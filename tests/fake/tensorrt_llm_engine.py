"""Engines over the stand-in of TensorRT-LLM, and the demo clip to talk about."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from framesink.runtime.engine import StreamingEngine
from framesink.runtime.events import Event
from framesink.runtime.executors.tensorrt_llm.options import TensorRTLLMOptions
from framesink.runtime.policies import SinkWindow
from framesink.runtime.session import Session
from framesink.runtime.video.capture import ChunkStream
from framesink.runtime.video.chunk import Chunk
from framesink.runtime.video.source import open_source

DEMO = Path(__file__).parents[2] / "demo"
MODEL, CLIP = DEMO / "model", DEMO / "clip.mp4"
WINDOW = 4
POLICY = SinkWindow(sink_text=12, recent_text=20, vision_seconds=WINDOW, reply_turns=WINDOW)
QUERY = "Say what happens."

MakeEngine = Callable[..., StreamingEngine]


@contextmanager
def tensorrt_llm_engines(bundle: Path) -> Iterator[MakeEngine]:
    """Makes engines, which are closed at the end: `threaded` or not, by TensorRTLLMOptions."""
    with ExitStack() as stack:

        def make(*, threaded: bool = False, **settings: Any) -> StreamingEngine:
            options = TensorRTLLMOptions(**settings)
            engine = StreamingEngine.load(
                bundle, "tensorrt_llm", threaded=threaded, tensorrt_llm=options
            )
            return stack.enter_context(engine)

        yield make


def open_session(engine: StreamingEngine, query: str = QUERY, **settings: Any) -> Session:
    """A session with a window of 4 turns and little text."""
    return engine.open_session(POLICY, query, **settings)


@cache
def demo_clip() -> tuple[Chunk, ...]:
    """The chunks of the demo clip."""
    with ChunkStream(open_source(str(CLIP)), fps=2.0, realtime=False) as chunks:
        return tuple(chunks)


def text_of(events: list[Event]) -> str:
    """What is said in events."""
    return "".join(event.text for event in events)
