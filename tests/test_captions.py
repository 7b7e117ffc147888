"""Caption files: valid WebVTT, complete JSONL, refused early, kept after a crash."""

import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framesink.runtime.captions.jsonl import JsonlWriter
from framesink.runtime.captions.webvtt import WebVttWriter, escape
from framesink.runtime.errors import OutputError
from framesink.runtime.events import Event, EventKind, ReplyTiming

CUE = re.compile(r"(\d{2,}):(\d\d):(\d\d)\.(\d{3}) --> (\d{2,}):(\d\d):(\d\d)\.(\d{3})")


def event(text: str, turn: int, *, kind: str = "commentary", final: bool = False, **more) -> Event:
    fields = {"t0": float(turn), "t1": turn + 1.0, "lag": 0.25, **more}
    return Event(kind=EventKind(kind), text=text, turn=turn, final=final, **fields)


def cues(document: str) -> list[tuple[int, int, str]]:
    """A small WebVTT parser, after the rules of the format and not after our writer."""
    assert document.startswith("WEBVTT")
    found = []
    for block in re.split(r"\n{2,}", document)[1:]:
        lines = block.strip("\n").split("\n")
        if lines[0].startswith("NOTE"):
            continue
        match = CUE.fullmatch(lines[0])
        assert match, lines
        assert "-->" not in "".join(lines[1:])
        numbers = [int(group) for group in match.groups()]
        start, end = (
            ((numbers[i] * 60 + numbers[i + 1]) * 60 + numbers[i + 2]) * 1000 + numbers[i + 3]
            for i in (0, 4)
        )
        found.append((start, end, "\n".join(lines[1:])))
    return found


def test_pieces_become_cues_and_silence_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "out.vtt"
    with WebVttWriter(path) as writer:
        writer.write(event("a red ", 0))
        writer.write(event("circle", 0, final=True))
        writer.write(event("", 1, kind="silence", final=True))
        writer.write(
            event("two & a <half>", 3661, kind="answer", final=True, question="1 --> 2?\n\nwho")
        )
    assert cues(path.read_text()) == [
        (0, 1000, "a red circle"),
        (3_661_000, 3_662_000, "<i>1 --&gt; 2?\nwho</i>\ntwo &amp; a &lt;half&gt;"),
    ]


replies = st.lists(
    st.tuples(
        st.text(max_size=20), st.floats(0, 1e5), st.floats(-1, 100), st.none() | st.text(max_size=9)
    ),
    max_size=8,
)


@given(replies)
def test_any_reply_gives_a_valid_document(tmp_path_factory: pytest.TempPathFactory, said) -> None:
    path = tmp_path_factory.mktemp("vtt") / "out.vtt"
    with WebVttWriter(path) as writer:
        for turn, (text, t0, length, question) in enumerate(said):
            writer.write(event(text, turn, final=True, t0=t0, t1=t0 + length, question=question))
    found = cues(path.read_text(encoding="utf-8"))
    assert len(found) == sum(bool(escape(text)) for text, *_ in said)
    assert all(start < end for start, end, _ in found)
    assert [start for start, _, _ in found] == sorted(start for start, _, _ in found)


@given(st.text())
def test_escaped_text_reads_as_it_was(text: str) -> None:
    shown = html.unescape(escape(text))
    plain = re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", "", text)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", plain)


def test_every_turn_is_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    timing = ReplyTiming(ttft=0.1, itl=(0.02, 0.04), total=0.16)
    with JsonlWriter(path) as writer:
        writer.write(event("ein ", 0))
        writer.write(event("Käfer\n", 0, final=True, tokens=(5, 6, 7), timing=timing))
        writer.write(event("", 1, kind="silence", final=True))
        writer.write(event("half size frames from here", 2, kind="degraded"))
        writer.write(event("cut ", 2))
        writer.write(event("the executor failed", 2, kind="error", final=True))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(line["turn"], line["kind"], line["text"], line["complete"]) for line in lines] == [
        (0, "commentary", "ein Käfer\n", True),
        (1, "silence", "", True),
        (2, "degraded", "half size frames from here", True),
        (2, "commentary", "cut ", False),
        (2, "error", "the executor failed", True),
    ]
    assert lines[0]["tokens"] == [5, 6, 7]
    assert (lines[0]["ttft"], lines[0]["itl"], lines[0]["total"]) == (0.1, 0.03, 0.16)
    assert lines[1]["ttft"] is None


@pytest.mark.parametrize("kind", [WebVttWriter, JsonlWriter])
def test_what_was_said_is_on_disk_before_the_end(tmp_path: Path, kind) -> None:
    writer = kind(tmp_path / "out")
    writer.start()
    writer.write(event("first", 0, final=True))
    writer.write(event("begun", 1))
    assert "first" in writer.path.read_text()
    writer.close()
    writer.close()
    assert "begun" in writer.path.read_text()


def test_unwritable_targets_are_refused_and_old_files_kept(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is a directory.*give another file\.$"):
        WebVttWriter(tmp_path)
    with pytest.raises(OutputError, match="no such file or directory"):
        JsonlWriter(tmp_path / "missing" / "out.jsonl")
    old = tmp_path / "old.vtt"
    old.write_text("precious")
    WebVttWriter(old).close()
    assert old.read_text() == "precious"
    WebVttWriter(tmp_path / "new.vtt").close()
    assert not (tmp_path / "new.vtt").exists()
    with WebVttWriter(old):
        pass
    assert old.read_text() == "WEBVTT\n"


def test_a_full_disk_is_one_sentence() -> None:
    with (
        pytest.raises(OutputError, match="no space left on device"),
        JsonlWriter("/dev/full") as writer,
    ):
        writer.write(event("x", 0, final=True))
