"""What Prometheus and the logs are told, and the dashboard that shows it."""

import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from fake.host import RecordingSink

from framesink.runtime.events import Event, EventKind, ReplyTiming
from framesink.runtime.observer import StepReport
from framesink.runtime.stats import EngineStats
from framesink.serving.errors import StatusCode
from framesink.serving.log_format import SessionLog, configure_logging
from framesink.serving.metrics import BATCH_SIZES, SECONDS, ServingMetrics
from framesink.serving.session_end import EndReason

STATS = EngineStats(
    4, 30, 50, 200, 2, 44, 1, 3.0, 0.01, 0.01, 0.5, predicted_load=0.6, rungs={0: 1, 2: 2, 7: 1}
)
DASHBOARD = Path(__file__).parents[1] / "docs" / "grafana" / "framesink.json"


def final(kind: EventKind, *, lag: float = 0.5, timed: bool = True) -> Event:
    timing = ReplyTiming(ttft=0.2, itl=(0.01, 0.03), total=0.24) if timed else None
    return Event(kind, "", 0.0, 1.0, 3, lag, final=True, timing=timing)


def histogram(sink: RecordingSink, name: str) -> tuple[dict[str, float], float, float]:
    """How many observations lie in each bucket that has any, how many there are, and their sum."""
    below = {
        key[1]: value for key, value in sink.values.items() if key[0] == f"framesink_{name}_bucket"
    }
    assert list(below)[-1] == "+Inf"
    counts = [*below.values()]
    within = [after - before for before, after in pairwise([0.0, *counts])]
    total, count = (sink.values[f"framesink_{name}_{part}",] for part in ("sum", "count"))
    assert counts[-1] == count
    return {le: n for le, n in zip(below, within, strict=True) if n}, count, round(total, 9)


def test_observations_beyond_the_last_bound_are_counted() -> None:
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    for seconds in (0.0, 1.0, 1.0001, 17.0, 500.0):
        metrics.encoded(1, seconds)
        metrics.flush()
    counts, count, total = histogram(sink, "encode_seconds")
    assert counts == {"0.005": 1, "1": 1, "2": 1, "+Inf": 2}
    assert (count, total) == (5, 519.0001)


def test_what_is_recorded_arrives_with_the_next_flush() -> None:
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    metrics.stepped(StepReport(decoding=3, prefilling=1, tokens=40, seconds=0.02))
    metrics.stepped(StepReport(decoding=4, prefilling=0, tokens=4, seconds=0.01))
    metrics.encoded(96, 0.5)
    metrics.turn_began(5, evicted_tokens=12, dropped_frames=2)
    metrics.turn_began(6, evicted_tokens=0, dropped_frames=0)
    metrics.reply_ended(final(EventKind.ANSWER))
    metrics.reply_ended(final(EventKind.ERROR, timed=False))
    metrics.refused(StatusCode.UNAVAILABLE)
    metrics.refused(StatusCode.UNAVAILABLE)
    metrics.session_refused()
    for change in (1, 1, 1, -1):
        metrics.session_waits(change)
    metrics.session_opened()
    metrics.session_ended(EndReason.IDLE)
    metrics.state(4, STATS, streams_that_fit=9)
    assert not any(sink.values.values())
    metrics.flush()
    histograms = ("_bucket", "_sum", "_count")
    plain = {key: value for key, value in sink.values.items() if not key[0].endswith(histograms)}
    assert {key: value for key, value in plain.items() if value} == {
        ("framesink_tokens_total",): 44,
        ("framesink_patches_total",): 96,
        ("framesink_evicted_tokens_total",): 12,
        ("framesink_dropped_frames_total",): 2,
        ("framesink_replies_total", "answer"): 1,
        ("framesink_replies_total", "error"): 1,
        ("framesink_refusals_total", "unavailable"): 2,
        ("framesink_sessions_opened_total",): 1,
        ("framesink_sessions_ended_total", "idle"): 1,
        ("framesink_sessions",): 4,
        ("framesink_sessions_refused_total",): 1,
        ("framesink_sessions_queued",): 2,
        ("framesink_sessions_by_rung", "0"): 1,
        ("framesink_sessions_by_rung", "2"): 2,
        ("framesink_sessions_by_rung", "3+"): 1,
        ("framesink_predicted_load",): 0.6,
        ("framesink_streams_that_fit",): 9,
        ("framesink_kv_pages", "used"): 30,
        ("framesink_kv_pages", "free"): 170,
        ("framesink_kv_pages", "reserved"): 50,
    }
    assert histogram(sink, "ttft_seconds") == ({"0.3": 1}, 1, 0.2)
    assert histogram(sink, "itl_seconds") == ({"0.01": 1, "0.04": 1}, 2, 0.04)
    assert histogram(sink, "lag_seconds") == ({"0.6": 1}, 1, 0.5)
    assert histogram(sink, "step_batch_size") == ({"4": 2}, 2, 8.0)
    assert histogram(sink, "step_seconds") == ({"0.01": 1, "0.02": 1}, 2, 0.03)
    assert histogram(sink, "encode_seconds") == ({"0.6": 1}, 1, 0.5)
    before = dict(sink.values)
    metrics.flush()
    assert sink.values == before


def test_nothing_recorded_while_flushing_is_lost_or_doubled() -> None:
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    stop = threading.Event()

    def flush() -> None:
        while not stop.is_set():
            metrics.flush()

    flusher = threading.Thread(target=flush)
    flusher.start()

    def record() -> None:
        for _ in range(2000):
            metrics.chunk_taken()
            metrics.encoded(1, 0.1)

    writers = [threading.Thread(target=record) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    flusher.join()
    metrics.flush()
    assert sink.values["framesink_chunks_total",] == 6000
    assert sink.values["framesink_encode_seconds_count",] == 6000
    assert sink.values["framesink_encode_seconds_bucket", "0.15"] == 6000


def test_buckets_tell_good_from_bad() -> None:
    """A chunk lasts a second, a token some milliseconds; 36 streams share a step at the goal."""
    assert {0.01, 1.0} <= set(SECONDS)
    assert max(BATCH_SIZES) > 36


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"framesink_\w+", " ".join(queries)))
    sink = RecordingSink()
    metrics = ServingMetrics(sink)
    metrics.state(0, STATS, streams_that_fit=9)
    metrics.flush()
    names = {name for name, *_ in sink.values}
    assert shown <= names
    assert {name for name in names - shown if not name.endswith(("_sum", "_count"))} == set()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in panels)


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logger = logging.getLogger("framesink")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    configure_logging(stream)
    yield stream
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_log_lines_are_json_with_the_session(log_lines: io.StringIO) -> None:
    number = (1 << 62) + 1
    log = SessionLog(logging.getLogger("framesink.serving"), number)
    log.info('A frame of "%s"\nand more', "Ä")
    logging.getLogger("framesink.serving").warning("Nobody's")
    logging.getLogger("framesink.serving").debug("Unsaid")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("It failed")
    first, second, third = map(json.loads, log_lines.getvalue().splitlines())
    assert first["message"] == 'A frame of "Ä"\nand more'
    assert (first["level"], first["session"]) == ("info", str(number))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert "session" not in second
    assert "ValueError: broken" in third["error"]
