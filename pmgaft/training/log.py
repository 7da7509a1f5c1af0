"""RUN/log.jsonl: every event of a run, one JSON object a line, for machines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"


def write_event(directory: Path, event: str, figures: dict[str, Any]) -> None:
    """Append one event with the time, in seconds since 1970."""
    with (directory / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(json.dumps({"event": event, "time": round(time.time(), 3)} | figures) + "\n")


def mend(directory: Path) -> None:
    """Cut off a last line that a process was killed in the midst of."""
    path = directory / LOG_FILE
    if path.is_file():
        with path.open("r+b") as log:
            log.truncate(log.read().rfind(b"\n") + 1)


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The events of a run, in the order they happened; of a step that was done twice (after a resume), the last."""
    text = (directory / LOG_FILE).read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    last = {(event["event"], event.get("step")): place for place, event in enumerate(events)}
    return [event for place, event in enumerate(events) if last[event["event"], event.get("step")] == place]
