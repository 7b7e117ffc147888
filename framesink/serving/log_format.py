"""Structured logs: one JSON object a line, with the session it is about."""

import json
import logging
from datetime import UTC, datetime
from typing import TextIO


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, and, where the record has
    them, the session's sequence id and the error with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        session = getattr(record, "session", None)
        if session is not None:
            line["session"] = str(session)  # JSON readers round whole numbers above 2^53
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(stream: TextIO, level: str = "info") -> None:
    """Send framesink's log records from `level` on to `stream` as JSON lines, and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("framesink")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


class SessionLog(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records carry a session's sequence id."""

    def __init__(self, logger: logging.Logger, session: int) -> None:
        super().__init__(logger, {"session": session})
