"""Endless video costs no more than a minute of it, and many streams say what each says alone."""

import gc
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
from reference.dense_policies import DenseFullAttention, DenseSinkWindow, DenseSlidingWindow
from reference.scenario import Scenario, recording_engine
from reference.suppressing import SuppressingExecutor

from framesink.runtime.bundle import Bundle
from framesink.runtime.engine import StreamingEngine
from framesink.runtime.executors import create_executor

CHUNKS = 400
# By then every window is full and chunk times have as many digits as at the end.
SETTLED = 112
# Pages in use depend on where in a page a lane stands: a cycle of as many chunks as rows of a page.
CYCLE = 16
CONTAINER_GROWTH = 100
RESIDENT_GROWTH = 4_000_000
SESSIONS = 16
SESSION_CHUNKS = 14


def _talkative_engine(directory: Path) -> StreamingEngine:
    """An engine whose replies all reach the token limit, so that turns are equally long."""
    bundle = Bundle.open(directory, check="sizes")
    executor, _ = create_executor(bundle, "onnxruntime", num_pages=512, threads=1)
    protocol, manifest = bundle.protocol(), bundle.manifest
    return StreamingEngine(
        SuppressingExecutor(executor, [*protocol.stop_tokens, *protocol.reply_closing]),
        manifest.model,
        protocol,
        manifest.preprocess,
        manifest.streaming,
        manifest.limits,
        threaded=False,
    )


def test_hundreds_of_chunks_hold_no_more_than_the_first(tiny_bundle: Path) -> None:
    """Tokens, pages and memory after 400 chunks are those after 112.

    One container kept each chunk would be 272 more of them; the 56 kB of patches of each chunk
    would be four times the bound on the resident size.
    """
    scenario = Scenario(DenseSinkWindow(4, 4, 12, 16), query="Commentate.", max_new_tokens=5)
    tokens, pages = np.zeros((2, CHUNKS), dtype=np.int64)
    containers, resident = {}, {}
    with _talkative_engine(tiny_bundle) as engine:
        session = scenario.open_session(engine)
        for number in range(CHUNKS):
            session.push_chunk(scenario.chunk(number))
            assert len(list(session)[-1].tokens) == scenario.max_new_tokens
            tokens[number] = session.stats().context_tokens
            pages[number] = engine.stats().pages_used
            if number in (SETTLED + CYCLE - 1, CHUNKS - 1):
                gc.collect()
                containers[number] = len(gc.get_objects())
                resident[number] = psutil.Process().memory_info().rss
        assert session.stats().turns == CHUNKS
        session.close()
        engine.check_integrity()
        assert engine.stats().pages_used == 0
    assert set(tokens[SETTLED:]) == {tokens[-1]}
    assert pages[-CYCLE:].tolist() == pages[SETTLED : SETTLED + CYCLE].tolist()
    (early, late) = containers.values()
    assert late - early < CONTAINER_GROWTH
    (early, late) = resident.values()
    assert late - early < RESIDENT_GROWTH


def _mixed_scenarios() -> list[Scenario]:
    policies = [
        DenseSinkWindow(3, 5, 12, 16),
        DenseSinkWindow(5, 2, 7, 9),
        DenseSlidingWindow(4),
        DenseFullAttention(),
    ]
    return [
        Scenario(
            policies[number % len(policies)],
            query=("Commentate.", "What entered last?", None)[number % 3],
            questions={2 + number % 5: "How many circles?"},
            sizes={0: (56, 84), 3 + number % 4: (84, 84)},
            max_new_tokens=3 + number % 6,
            seed=number,
        )
        for number in range(SESSIONS)
    ]


def _alone(bundle: Path, scenario: Scenario) -> list[tuple[int, ...]]:
    with recording_engine(bundle) as (engine, _):
        session = scenario.open_session(engine)
        said = []
        for number in range(SESSION_CHUNKS):
            if number in scenario.questions:
                session.ask(scenario.questions[number])
            session.push_chunk(scenario.chunk(number))
            said.append(list(session)[-1].tokens)
    return said


def test_sessions_that_share_steps_say_what_each_says_alone(tiny_bundle: Path) -> None:
    scenarios = _mixed_scenarios()
    alone = [_alone(tiny_bundle, scenario) for scenario in scenarios]
    assert len({tuple(said) for said in alone}) == SESSIONS

    together: list[list[tuple[int, ...]]] = [[] for _ in scenarios]
    with recording_engine(tiny_bundle, num_pages=4096) as (engine, recorder):
        sessions = {}
        for tick in range(SESSION_CHUNKS + SESSIONS // 2):
            for number, scenario in enumerate(scenarios):
                chunk = tick - number // 2
                if chunk == 0:
                    sessions[number] = scenario.open_session(engine)
                if 0 <= chunk < SESSION_CHUNKS:
                    if chunk in scenario.questions:
                        sessions[number].ask(scenario.questions[chunk])
                    sessions[number].push_chunk(scenario.chunk(chunk))
                if chunk == SESSION_CHUNKS:
                    sessions.pop(number).close()
            engine.run_until_idle()
            for number, session in sessions.items():
                together[number] += [event.tokens for event in session if event.final]
        for session in sessions.values():
            session.close()
        engine.check_integrity()
        assert engine.stats().pages_used == 0
        steps = recorder.take()
    assert together == alone
    assert max(step.batch_size for step in steps) > 3
    prefills = [step for step in steps if len(step.new) > 1]
    assert max(step.batch_size for step in prefills) > 1


def test_sessions_fed_by_threads_say_what_each_says_alone(tiny_bundle: Path) -> None:
    """The same through the engine's own thread, where chance decides who shares a step."""
    scenarios = _mixed_scenarios()[:8]
    alone = [_alone(tiny_bundle, scenario) for scenario in scenarios]
    said: list[list[tuple[int, ...]]] = [[] for _ in scenarios]
    with StreamingEngine.load(tiny_bundle, num_pages=4096, threads=1) as engine:

        def feed(number: int, scenario: Scenario) -> None:
            session = scenario.open_session(engine)

            def read() -> None:
                said[number].extend(event.tokens for event in session if event.final)

            reader = Thread(target=read)
            reader.start()
            for chunk in range(SESSION_CHUNKS):
                if chunk in scenario.questions:
                    # A question joins the next chunk that is taken: let those before it be taken.
                    while session.stats().turns < chunk:
                        reader.join(0.005)
                    session.ask(scenario.questions[chunk])
                session.push_chunk(scenario.chunk(chunk))
            session.finish()
            reader.join()
            session.close()

        feeders = [
            Thread(target=feed, args=(number, scenario))
            for number, scenario in enumerate(scenarios)
        ]
        for feeder in feeders:
            feeder.start()
        for feeder in feeders:
            feeder.join()
    assert said == alone
