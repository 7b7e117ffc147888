"""Tokens chosen where the logits are, against the host's sampler with the same random numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.dense_policies import DenseSinkWindow
from reference.executor_sessions import engine_of
from reference.scenario import NUM_PAGES, Scenario

from framesink.runtime.arrays import Float32Array
from framesink.runtime.bundle import Bundle
from framesink.runtime.executors import create_executor
from framesink.runtime.executors.base import NEXT_TOKEN, ContextView, SequenceInput
from framesink.runtime.sampler import Sampler, SamplingParams, SeenTokens

torch = pytest.importorskip("torch", reason="the executor runs in torch")

# First of all: it says how kernels are run here.
from reference.triton_device import DEVICE, HAS_GPU  # noqa: E402, I001
from reference import plain_kernels  # noqa: E402
from reference.cpu_executor import cpu_executor  # noqa: E402

from framesink.runtime.executors.cuda import kernel_operations  # noqa: E402
from framesink.runtime.executors.cuda.answers import PendingAnswers  # noqa: E402
from framesink.runtime.executors.cuda.executor import CudaExecutor  # noqa: E402
from framesink.runtime.executors.cuda.kernels.step_tokens import NOT_FINITE  # noqa: E402
from framesink.runtime.executors.cuda.staging import Staging  # noqa: E402
from framesink.runtime.executors.cuda.token_choice import TokenChooser  # noqa: E402

VOCABULARY = 600
SUPPRESSED = frozenset({3, 4, 77})
ROWS = 6
STEPS = 4
EMPTY = np.zeros(1, np.int32)
NOTHING = ContextView(EMPTY, np.zeros((3, 16), np.int32), np.zeros(16, np.bool_), EMPTY, (1, 0))

parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 60, VOCABULARY, VOCABULARY + 9]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 2.0, 0.8]),
    seed=st.integers(0, 2**32),
)


class Chooser:
    """The executor's part, without a model."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        device = torch.device(DEVICE)
        operations = kernel_operations if HAS_GPU else plain_kernels
        self._chooser = TokenChooser(vocabulary, ROWS, operations, device)
        self._staging = Staging(1 << 18, device)

    def step(self, batch: list[SequenceInput], rows: list[int], logits: Float32Array) -> list[int]:
        """The tokens of a step that gave these logits."""
        assert all(self._chooser.serves(given.choice) for given in batch)
        self._staging.clear()
        prepared = self._chooser.prepare(batch, rows, self._staging)
        self._staging.send()
        on_device = torch.from_numpy(logits).to(DEVICE)
        if prepared is not None:
            self._chooser.mark(prepared)
        contexts = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        tokens = self._chooser.choose(on_device, contexts)
        if prepared is not None:
            self._chooser.replace(prepared, on_device, tokens)
        chosen: list[int] = tokens.tolist()
        assert self._chooser.last_tokens[contexts].tolist() == chosen
        return chosen


class Session:
    """What one session gives an executor, and what its own sampler says in its place."""

    def __init__(self, params: SamplingParams, vocabulary: int = VOCABULARY) -> None:
        self._theirs = Sampler(params, SUPPRESSED)
        self._ours = Sampler(params, SUPPRESSED)
        self._vocabulary = vocabulary
        self._fed = 0
        self._under_way = False
        self.begin_turn([])

    def begin_turn(self, tokens: list[int]) -> None:
        """A context of these tokens."""
        if self._under_way:
            self._learn()
        self._seen = np.zeros(self._vocabulary, np.bool_)
        self._seen[tokens] = True
        self._known = SeenTokens(self._vocabulary)
        self._known.add(tokens)
        self._under_way = False

    def given(self, *, early: bool) -> SequenceInput:
        """The next step's input; early: before the token of the step before is known."""
        early = early and self._under_way
        if self._under_way and not early:
            self._learn()
        choice = self._ours.choice(self._known, ahead=int(early))
        token = np.array([NEXT_TOKEN if early else self._fed], np.int32)
        if early:
            self._learn()
        self._under_way = True
        return SequenceInput(
            token, None, np.zeros((3, 1), np.int32), EMPTY, NOTHING, True, EMPTY, choice
        )

    def expect(self, logits: Float32Array) -> int:
        """The token by the host's sampler."""
        self._fed = self._theirs.sample(logits, self._seen)
        self._seen[self._fed] = True
        return self._fed

    def _learn(self) -> None:
        self._ours.accept()
        self._known.add([self._fed])


def random_logits(random: np.random.Generator, *shape: int, coarse: bool) -> Float32Array:
    """Logits, many of them alike if they are coarse, as 16-bit ones are."""
    logits = random.standard_normal(shape) * 3
    return (np.round(logits * 8) / 8 if coarse else logits).astype(np.float32)


@given(
    params=st.lists(parameters, min_size=1, max_size=ROWS),
    coarse=st.booleans(),
    early=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25 if HAS_GPU else 120, deadline=None)
def test_tokens_are_those_of_the_host(
    params: list[SamplingParams], coarse: bool, early: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    chooser = Chooser()
    sessions = [Session(given) for given in params]
    for _ in range(2):
        rows = random.permutation(ROWS)[: len(params)].tolist()
        for session in sessions:
            session.begin_turn(random.integers(0, VOCABULARY, 90).tolist())
        for _ in range(STEPS):
            batch = [session.given(early=early) for session in sessions]
            logits = random_logits(random, len(params), VOCABULARY, coarse=coarse)
            expected = [session.expect(row) for session, row in zip(sessions, logits, strict=True)]
            assert chooser.step(batch, rows, logits) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="there is no NVIDIA GPU on this machine")
def test_a_whole_vocabulary() -> None:
    vocabulary = 152_064
    random = np.random.default_rng(8)
    chooser = Chooser(vocabulary)
    options = [(0.0, 0, 1.0, 1.1), (0.8, 0, 1.0, 1.0), (0.7, 40, 0.9, 1.05), (1.2, 0, 0.95, 1.0)]
    sessions = [
        Session(SamplingParams(*given, seed=seed), vocabulary) for seed, given in enumerate(options)
    ]
    for session in sessions:
        session.begin_turn(random.integers(0, vocabulary, 9000).tolist())
    for step in range(60):
        batch = [session.given(early=step % 2 == 1) for session in sessions]
        logits = random_logits(random, len(options), vocabulary, coarse=True)
        expected = [session.expect(row) for session, row in zip(sessions, logits, strict=True)]
        assert chooser.step(batch, [4, 1, 0, 3], logits) == expected


def test_logits_that_are_not_numbers_are_left_to_the_host() -> None:
    params = [SamplingParams(temperature=0.9, top_p=0.5), SamplingParams(), SamplingParams(1.0)]
    logits = random_logits(np.random.default_rng(1), 3, VOCABULARY, coarse=False)
    logits[0, 9], logits[1, 200] = np.nan, np.inf
    batch = [Session(given).given(early=False) for given in params]
    found = Chooser().step(batch, [0, 1, 2], logits)
    assert found[:2] == [NOT_FINITE] * 2
    assert found[2] != NOT_FINITE


def test_numbers_that_were_drawn_are_not_lost() -> None:
    params = SamplingParams(temperature=1.0, seed=4)
    asked, plain = Sampler(params), np.random.default_rng(4)
    drawn = [plain.random() for _ in range(3)]
    assert [asked.choice(ahead=ahead).fraction for ahead in (0, 1, 1, 0)] == [
        drawn[index] for index in (0, 1, 1, 0)
    ]
    asked.accept()
    assert [asked.choice(ahead=ahead).fraction for ahead in (0, 1)] == drawn[1:]
    greedy = Sampler(SamplingParams())
    assert greedy.choice().fraction == 0.0
    greedy.accept()


def test_seen_tokens_are_told_once() -> None:
    seen = SeenTokens(10)
    seen.add([7, 2, 7])
    told = len(seen)
    seen.add(np.array([2, 9, 9, 0], np.int32))
    assert sorted(seen.after(told).tolist()) == [0, 9]
    assert sorted(seen.after(0).tolist()) == np.flatnonzero(seen.mask).tolist() == [0, 2, 7, 9]


class WithoutLogits(CudaExecutor):
    """Fails where logits travel, and counts steps that are fed a token nobody has seen."""

    fed_early = 0

    def launch(self, batch: Sequence[SequenceInput]) -> PendingAnswers:
        self.fed_early += sum(NEXT_TOKEN in given.token_ids for given in batch)
        return super().launch(batch)

    def collect(self, launched: object) -> list[Float32Array | int | None]:
        answers = super().collect(launched)
        assert all(answer is None or isinstance(answer, int) for answer in answers)
        return answers


def test_sessions_sample_what_they_sample_on_the_host(tiny_bundle: Path) -> None:
    """Greedy, sampling and penalised sessions together, with evictions."""
    bundle = Bundle.open(tiny_bundle, check="sizes")
    graph, _ = create_executor(bundle, "onnxruntime", num_pages=NUM_PAGES, threads=1)
    ours = cpu_executor(bundle, WithoutLogits)
    options = [
        SamplingParams(),
        SamplingParams(temperature=1.1, seed=1),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=2),
    ]
    scenario = Scenario(DenseSinkWindow(3, 3, 4, 9))
    said = []
    for executor in (graph, ours):
        with engine_of(bundle, executor) as engine:
            sessions = [
                engine.open_session(scenario.engine_policy(), "What?", given, max_new_tokens=6)
                for given in options
            ]
            for number in range(12):
                for session in sessions:
                    session.push_chunk(scenario.chunk(number))
                engine.run_until_idle()
                said.append([list(session)[-1].tokens for session in sessions])
            assert all(session.stats().evicted_tokens > 0 for session in sessions)
    assert said[:12] == said[12:]
    assert ours.fed_early > 0
    for number in range(1, 4):
        assert [turn[number] for turn in said[:12]] != [turn[0] for turn in said[:12]]
