"""Logging of a foreground process: lines of text, or JSON objects for log collectors."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import msgspec

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One object a line: time (seconds since 1970), level, logger, message, and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        fields: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def set_up(form: LogFormat, level: str) -> None:
    """Sends this process's log to stderr as text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
