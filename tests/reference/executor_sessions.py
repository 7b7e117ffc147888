"""Sessions over any executor of a bundle, and what is said in them."""

from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors.base import Executor
from reference.scenario import Scenario


def engine_of(bundle: Bundle, executor: Executor) -> StreamingEngine:
    manifest = bundle.manifest
    return StreamingEngine(
        executor,
        manifest.model,
        bundle.protocol(),
        manifest.preprocess,
        manifest.streaming,
        manifest.limits,
        threaded=False,
    )


def words(engine: StreamingEngine, scenario: Scenario, chunks: int) -> list[tuple[int, ...]]:
    """The tokens of every reply of one session."""
    said = []
    with scenario.open_session(engine) as session:
        for number in range(chunks):
            question = scenario.questions.get(number)
            if question is not None:
                session.ask(question)
            session.push_chunk(scenario.chunk(number))
            said.append(list(session)[-1].tokens)
        assert session.stats().evicted_tokens > 0
    return said
