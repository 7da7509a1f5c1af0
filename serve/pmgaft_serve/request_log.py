"""One line a request, from every worker to the launcher's output: what happened, how long it took, nothing of content.

Workers hand lines to a thread that sends them over a socket; the launcher writes them where it was told. Nobody who
answers requests ever waits for a terminal or a full pipe: what cannot be sent in time is dropped, and counted in the
next line that can.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from .service import Record

LogFormat = Literal["none", "text", "json"]
SOCKET = "log.sock"  # in the server's directory
MOST_WAITING = 10_000


def request_line(record: Record, form: LogFormat) -> str:
    """One request, without the line's end."""
    content: dict[str, Any] = {
        "event": "request",
        "id": record.id,
        "status": record.status,
        "outcome": record.outcome,
        "code": record.code,
        "ms": dict(record.milliseconds),
        "images": record.images,
        "labels": record.labels,
        "templates": record.templates,
        "probe": record.probe,
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
    }
    if form == "json":
        return event_line("info", content)
    stages = ", ".join(f"{stage} {value:.1f}" for stage, value in record.milliseconds.items() if stage != "total")
    return (
        f"{_now()} {record.status} {record.code} {record.milliseconds['total']:.1f} ms ({stages}) "
        f"images {record.images} labels {record.labels}{' probe' if record.probe else ''} id {record.id}"
    )


def event_line(level: str, content: Mapping[str, Any]) -> str:
    """Anything else that happened, as JSON, without the line's end."""
    return json.dumps({"time": _now(), "level": level, "worker": os.getpid(), **content})


class Lines:
    """A worker's end. form: of what `logging_handler` makes."""

    def __init__(self, path: Path, form: LogFormat) -> None:
        self.form = form
        self._path = path
        self._waiting: queue.Queue[str] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        threading.Thread(target=self._send_all, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        """Never waits."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def logging_handler(self) -> logging.Handler:
        """For warnings and errors of Python's logging."""
        return _Handler(self)

    def _send_all(self) -> None:
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(self._path))
                    while True:
                        connection.sendall(self._next().encode())
            except OSError:
                time.sleep(1)  # the launcher is not there (yet)

    def _next(self) -> str:
        """What waits now, as whole lines."""
        lines = [self._waiting.get()]
        while len(lines) < 100:
            try:
                lines.append(self._waiting.get_nowait())
            except queue.Empty:
                break
        if dropped := self._dropped:
            self._dropped -= dropped
            lines.append(self._message(f"{dropped} log lines were dropped: nobody read them in time"))
        return "".join(f"{line}\n" for line in lines)

    def _message(self, text: str) -> str:
        return text if self.form != "json" else event_line("warning", {"event": "log", "message": text})


class Collector:
    """The launcher's end, from construction until `close`. write: gets whole lines, with their ends."""

    def __init__(self, path: Path, write: Callable[[str], None] | None = None) -> None:
        put = write or _to_stdout
        readers = self._readers = set[threading.Thread]()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                readers.add(threading.current_thread())
                for line in self.rfile:
                    put(line.decode(errors="replace"))

        self._server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
        self._server.daemon_threads = True
        serve = {"poll_interval": 0.1}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting, and write what workers that have ended still sent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for reader in self._readers:
            reader.join(timeout=1)


class _Handler(logging.Handler):
    """Python's log records as lines."""

    def __init__(self, lines: Lines) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        content = {"event": "log", "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            content["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        if self._lines.form == "json":
            self._lines.write(event_line(record.levelname.lower(), content))
        else:
            self._lines.write(f"{_now()} {record.levelname} {content['message']}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _to_stdout(line: str) -> None:
    try:
        sys.stdout.write(line)
        sys.stdout.flush()
    except (OSError, ValueError):
        pass  # whoever read it has gone; that is no reason to stop serving
