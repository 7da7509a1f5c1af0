"""One line a request reaches the launcher's output, and no one who serves ever waits for it."""

import io
import json
import logging
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmgaft_serve import request_log
from pmgaft_serve.request_log import Collector, Lines, request_line
from pmgaft_serve.service import Record

RECORD = Record(
    traceparent="",
    id="id-1",
    status=200,
    outcome="ok",
    code="ok",
    milliseconds={"decode": 1.25, "image": 9.5, "total": 12.345},
    bytes_in=1000,
    bytes_out=200,
    images=1,
    labels=3,
    templates=1,
    probe=True,
)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="p") as short:  # a socket's path has some 100 bytes at most
        yield Path(short)


def test_a_request_is_one_json_line_with_id_outcome_times_and_counts() -> None:
    line = json.loads(request_line(RECORD, "json"))
    assert line["event"] == "request"
    assert line["ms"] == {"decode": 1.25, "image": 9.5, "total": 12.345}
    counts = {"images": 1, "labels": 3, "templates": 1, "bytes_in": 1000, "bytes_out": 200}
    assert counts.items() <= line.items()
    assert (line["id"], line["status"], line["outcome"], line["code"], line["probe"]) == ("id-1", 200, "ok", "ok", True)
    assert line["time"].endswith("Z")
    assert set(line) == {
        *("time", "level", "worker", "event", "id", "status", "outcome", "code", "ms"),
        *("images", "labels", "templates", "probe", "bytes_in", "bytes_out"),
    }


def test_a_request_is_one_line_of_text() -> None:
    line = request_line(RECORD, "text")
    assert "\n" not in line
    assert " 200 ok 12.3 ms (decode 1.2, image 9.5) images 1 labels 3 probe id id-1" in line


def test_lines_of_several_workers_arrive_whole(directory: Path) -> None:
    got: list[str] = []
    everything = threading.Event()

    def write(line: str) -> None:
        got.append(line)
        if len(got) == 400:
            everything.set()

    collector = Collector(directory / "log.sock", write)
    workers = [Lines(directory / "log.sock", "text") for _ in range(2)]
    for number in range(200):
        for name, worker in enumerate(workers):
            worker.write(f"{name} {number} {'x' * 500}")
    assert everything.wait(20)
    collector.close()
    for name in range(2):
        mine = [line for line in got if line.startswith(f"{name} ")]
        assert mine == [f"{name} {number} {'x' * 500}\n" for number in range(200)]


def test_a_launcher_that_does_not_read_costs_lines_and_no_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MOST_WAITING", 10)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(directory / "log.sock"))
        deaf.listen()
        lines = Lines(directory / "log.sock", "text")
        for _ in range(5000):  # far more than a socket's buffer
            lines.write("x" * 1000)
        assert lines._dropped > 0
        connection, _ = deaf.accept()
        with connection, connection.makefile("r") as reader:
            told = next(line for line in reader if "dropped" in line)
    assert "log lines were dropped" in told


def test_warnings_and_errors_become_lines_too(directory: Path) -> None:
    got: list[str] = []
    arrived = threading.Event()

    def write(line: str) -> None:
        got.append(line)
        arrived.set()

    collector = Collector(directory / "log.sock", write)
    handler = Lines(directory / "log.sock", "json").logging_handler()
    logger = logging.Logger("pmgaft_serve.test")
    logger.addHandler(handler)
    logger.info("not this")
    try:
        raise ValueError("what happened")
    except ValueError:
        logger.exception("request %s failed", 7)
    assert arrived.wait(20)
    collector.close()
    line = json.loads(got[0])
    assert (line["level"], line["event"], line["message"]) == ("error", "log", "request 7 failed")
    assert "what happened" in line["traceback"]


def test_an_output_that_is_gone_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdout", closed)
    request_log._to_stdout("line\n")
