"""An executor of whole prompts whose replies are written down, and an engine over it."""

from collections.abc import Callable, Sequence

from fake.engine import LIMITS, PREPROCESS, make_model, make_protocol
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.manifest import StreamingDefaults
from framesink.runtime.observer import EngineObserver
from framesink.runtime.prompting.executor import PromptSettings, ReplyRequest
from framesink.runtime.protocol import ChatProtocol

Reply = Callable[[ReplyRequest], Sequence[int]]


class WrittenReply:
    """A reply that is there at once; one of no tokens ends only when it is cancelled."""

    def __init__(self, tokens: Sequence[int], notify: Callable[[], None]) -> None:
        self._tokens = list(tokens)
        self._notify = notify
        self.ended = bool(tokens)
        self.failure: str | None = None
        self.cancelled = False

    def take(self) -> list[int]:
        taken, self._tokens = self._tokens, []
        return taken

    def cancel(self) -> None:
        self.cancelled = self.ended = True
        self._notify()

    def wait(self, seconds: float) -> bool:
        return self.ended


class WrittenExecutor:
    """Answers every request by `reply`; keeps the requests."""

    name = "written"

    def __init__(self, reply: Reply, settings: PromptSettings) -> None:
        self.settings = settings
        self.requests: list[ReplyRequest] = []
        self.replies: list[WrittenReply] = []
        self.closed = False
        self._reply = reply

    def generate(self, request: ReplyRequest, notify: Callable[[], None]) -> WrittenReply:
        self.requests.append(request)
        self.replies.append(WrittenReply(self._reply(request), notify))
        return self.replies[-1]

    def close(self) -> None:
        self.closed = True


def make_prompt_engine(
    reply: Reply,
    *,
    protocol: ChatProtocol | None = None,
    trim_turns: int = 1,
    threaded: bool = False,
    observer: EngineObserver | None = None,
) -> tuple[StreamingEngine, WrittenExecutor]:
    """Sessions have no query and 6 new tokens by default."""
    protocol = protocol or make_protocol()
    executor = WrittenExecutor(reply, PromptSettings(trim_turns))
    engine = StreamingEngine(
        executor,
        make_model(protocol),
        protocol,
        PREPROCESS,
        StreamingDefaults(max_new_tokens=6, sink_text=8, recent_text=12, vision_seconds=3.0),
        LIMITS,
        threaded=threaded,
        observer=observer,
    )
    return engine, executor
