"""JSONL: everything a session said, one JSON object a line, for programs.

| field | type | meaning |
|---|---|---|
| `turn` | integer | the chunk's number in the session, from 0 |
| `kind` | string | `commentary`, `answer`, `silence`, `degraded` or `error` |
| `t0`, `t1` | number | video time the reply is about, seconds |
| `text` | string | what was said; empty for silence; the sentence of a `degraded` or `error` |
| `question` | string or null | the question an `answer` answers |
| `complete` | boolean | false if the stream was ended before the reply was |
| `lag` | number | seconds from the end of the chunk to the end of the reply |
| `tokens` | array of integers | token ids of the reply |
| `ttft` | number or null | seconds from the chunk being handed over to the first token |
| `itl` | number or null | mean seconds between the following tokens |
| `total` | number or null | seconds from the chunk being handed over to the last token |
"""

import json
import statistics

from framesink.runtime.captions.writer import CaptionWriter
from framesink.runtime.events import Event, ReplyTiming


class JsonlWriter(CaptionWriter):
    """One line per reply, silent ones included, and one per notice."""

    def reply(self, event: Event, text: str) -> str:
        """See CaptionWriter."""
        return _line(event, text, complete=event.final)

    def notice(self, event: Event) -> str:
        """See CaptionWriter."""
        return _line(event, event.text, complete=True)


def _line(event: Event, text: str, *, complete: bool) -> str:
    record = {
        "turn": event.turn,
        "kind": event.kind.value,
        "t0": round(event.t0, 3),
        "t1": round(event.t1, 3),
        "text": text,
        "question": event.question,
        "complete": complete,
        "lag": round(event.lag, 4),
        "tokens": event.tokens,
        **_timing(event.timing),
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _timing(timing: ReplyTiming | None) -> dict[str, float | None]:
    if timing is None:
        return {"ttft": None, "itl": None, "total": None}
    return {
        "ttft": round(timing.ttft, 4),
        "itl": round(statistics.fmean(timing.itl), 4) if timing.itl else None,
        "total": round(timing.total, 4),
    }
