"""The load generator: what it sends, what it counts, and whom it charges for waiting."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmgaft.cli import main
from pmgaft.clip.preprocess import open_image
from pmgaft.errors import InputError, ServerError
from pmgaft_serve import bench as bench_module
from pmgaft_serve.bench import (
    Load,
    Report,
    Target,
    drawn,
    form_message,
    http_message,
    picture,
    quantile,
    rotating,
    run,
    target_of,
)
from pmgaft_serve.protocol import Limits, parse

Answer = Callable[[int, bytes], tuple[int, dict[str, Any]]]


@contextmanager
def listening(answer: Answer) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers request number n with (status, JSON). Gives its address and the bodies it got."""
    bodies: list[bytes] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                bodies.append(body)
                number = len(bodies) - 1
            status, content = answer(number, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            if status != 200:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def load(url: str, **options: Any) -> Load:
    target = target_of(url)
    message = rotating([http_message(target, b"a", "text/plain"), http_message(target, b"b", "text/plain")])
    settings: dict[str, Any] = {"concurrency": 4, "seconds": 0.3, "warmup": 0.05}
    return Load(target=target, message=message, **(settings | options))


def test_everything_that_was_answered_is_counted_and_messages_rotate() -> None:
    with listening(lambda number, body: (200, {})) as (url, bodies):
        report = run(load(url))
    assert report.statuses == {"200": report.requests}
    assert 0 < report.requests <= len(bodies)
    assert report.throughput == pytest.approx(report.requests / 0.3, rel=0.01)
    assert set(bodies) == {b"a", b"b"}
    assert report.unanswered == {}
    times = report.latency_ms
    assert 0 < times["p50"] <= times["p90"] <= times["p95"] <= times["p99"] <= times["max"]


def test_a_number_of_requests_may_be_asked_for_instead_of_a_time() -> None:
    with listening(lambda number, body: (200, {})) as (url, bodies):
        report = run(load(url, seconds=60.0, requests=10))
        assert (len(bodies), report.requests) == (10, 10)
        assert report.seconds < 60
        assert report.throughput == pytest.approx(10 / report.seconds, rel=0.01)
        assert run(load(url, seconds=60.0, requests=10, rate=500.0)).requests == 10


def test_mistakes_are_counted_by_status_and_code_and_are_no_answers() -> None:
    def answer(number: int, body: bytes) -> tuple[int, dict[str, Any]]:
        return (200, {}) if number % 2 else (503, {"error": {"code": "overloaded"}})

    with listening(answer) as (url, _):
        report = run(load(url))
    assert set(report.statuses) == {"200", "503"}
    assert report.codes == {"overloaded": report.statuses["503"]}
    assert report.requests == report.statuses["200"]
    assert 0 < report.refusal_ms["p50"] <= report.refusal_ms["max"]


def test_as_many_requests_are_in_flight_as_asked_for_and_no_more() -> None:
    most = 0
    inside = 0
    everyone = threading.Barrier(3)
    lock = threading.Lock()

    def answer(number: int, body: bytes) -> tuple[int, dict[str, Any]]:
        nonlocal most, inside
        with lock:
            inside += 1
            most = max(most, inside)
        if number < 3:
            everyone.wait(20)  # goes on once three are here
        with lock:
            inside -= 1
        return 200, {}

    with listening(answer) as (url, _):
        run(load(url, concurrency=3))
    assert most == 3


def test_a_request_is_charged_from_when_it_was_due_and_not_from_when_it_could_be_sent() -> None:
    async def scene(url: str) -> float:
        state = bench_module._Run(load(url))
        now = time.perf_counter()
        state.begin, state.end = now - 100, now + 100
        await state.ask(due=now - 7)  # was due seven seconds ago, and waited for a free connection
        for connection in state.everyone:
            connection.close()
        return state.latencies[0]

    with listening(lambda number, body: (200, {})) as (url, _):
        assert 7 <= asyncio.run(scene(url)) < 60


def test_an_open_loop_sends_what_is_due_and_no_more() -> None:
    with listening(lambda number, body: (200, {})) as (url, bodies):
        report = run(load(url, rate=50.0, seconds=0.4, warmup=0.1))
    assert len(bodies) == 25
    assert report.rate == 50


def test_a_server_that_hangs_up_is_counted_as_unanswered() -> None:
    async def scene() -> Report:
        def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.abort()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await bench_module._run(load(f"http://127.0.0.1:{port}", concurrency=1, seconds=0.1, warmup=0.0))

    report = asyncio.run(scene())
    assert report.requests == 0
    assert sum(report.unanswered.values()) > 0
    assert (report.latency_ms, report.refusal_ms) == ({}, {})


def test_nobody_there_is_said_at_once() -> None:
    with listening(lambda number, body: (200, {})) as (url, _):
        pass
    with pytest.raises(ServerError, match="no server answers"):
        run(load(url))


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://x", "http://", "http://x:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="no address of a server"):
        target_of(url)


def test_addresses_are_taken_apart() -> None:
    assert target_of("http://[::1]:81/base/", "/p") == Target(host="::1", port=81, path="/base/p")
    assert target_of("http://[::1]:81").authority == "[::1]:81"
    assert target_of("https://x").port == 443


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_is_the_smallest_value_that_covers_its_share(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-6
    assert sum(value < found for value in ordered) < share * len(ordered) + 1e-6


def test_a_form_is_one_that_the_server_reads() -> None:
    target = target_of("http://x")
    message = form_message(target, b"\xff\x00image", ["cat", "hot, dög"], {"X-A": "b"}, top_k="2")
    head, _, body = message.partition(b"\r\n\r\n")
    headers = BytesParser(policy=HTTP).parsebytes(head.partition(b"\r\n")[2] + b"\r\n\r\n")
    assert int(headers["Content-Length"]) == len(body)
    assert headers["X-A"] == "b"
    whole = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
    fields = {}
    for part in whole.iter_parts():
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        fields[str(part.get_param("name", header="Content-Disposition"))] = content
    asked = parse("multipart/form-data", fields, Limits())
    assert (asked.images, asked.labels, asked.top_k) == ((b"\xff\x00image",), ("cat", "hot, dög"), 2)


def test_label_lists_are_drawn_without_repeating_a_label() -> None:
    labels = [str(number) for number in range(20)]
    lists = drawn(labels, 10, 5)
    assert all(len(set(one)) == 10 and set(one) <= set(labels) for one in lists)
    assert len({tuple(one) for one in lists}) == 5
    assert drawn(labels, 10, 5) == lists


def test_the_made_up_picture_is_a_picture() -> None:
    assert open_image(picture(50, 37)).size == (50, 37)
    assert isinstance(open_image(picture(50, 37)), Image.Image)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["bench", *arguments])


def test_the_command_prints_figures_for_people_and_for_programs() -> None:
    with listening(lambda number, body: (200, {})) as (url, bodies):
        short = (url, "--seconds", "0.2", "--warm-up", "0", "--concurrency", "2")
        told = command(*short)
        assert told.exit_code == 0, told.output
        assert "2 at once" in told.stdout
        assert "p95" in told.stdout
        figures = json.loads(command(*short, "--json").stdout)
        assert figures["throughput"] > 0
        assert b'"thing 9"' in bodies[0]


def test_the_command_can_send_labels_that_nobody_has_seen() -> None:
    with listening(lambda number, body: (200, {})) as (url, bodies):
        command(url, "--seconds", "0.2", "--warm-up", "0", "--concurrency", "2", "--fresh", "3")
    lists = [body[body.index(b'["') : body.index(b'"]')] for body in bodies]
    assert len(set(lists)) == len(lists) > 1


def test_the_command_fails_where_anything_was_refused() -> None:
    with listening(lambda number, body: (422, {"error": {"code": "labels_empty"}})) as (url, _):
        told = command(url, "--seconds", "0.1", "--warm-up", "0")
    assert told.exit_code == 1
    assert "labels_empty" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nowhere",), "no address"),
        (("--draw", "11"), "at least so many"),
        (("--labels", "@pets", "--draw", "2"), "at least so many"),
        (("--labels", "a,b", "--fresh", "3"), "--fresh"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments: tuple[str, ...], told: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
