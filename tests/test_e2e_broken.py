"""A real server, broken on purpose: clients that misbehave, a full disk, files changed under it, Java killed."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import LABELS, PNG, Running, connect, read_to_the_end, wait_for

from pmgaft_serve.bench import form_message, target_of
from pmgaft_serve.client import Client, Question
from pmgaft_serve.metrics import total
from pmgaft_serve.protocol import PATH
from pmgaft_serve.torchserve import ServeOptions, Server, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

IDLE = 500


def message(server: Server) -> bytes:
    """A whole request that is answered with 200."""
    return form_message(target_of(server.url), PNG, LABELS)


def request(body: Mapping[str, Any], *headers: str) -> bytes:
    content = json.dumps({"image": base64.b64encode(PNG).decode(), "labels": LABELS} | body)
    length = f"Content-Length: {len(content)}"
    lines = [f"POST {PATH} HTTP/1.1", "Host: x", "Content-Type: application/json", length, *headers]
    return ("\r\n".join([*lines, "", ""]) + content).encode()


def answers(running: Running) -> bool:
    return running.ask().status_code == 200


# Clients


def test_a_client_that_hangs_up_costs_nobody_anything(running: Running) -> None:
    whole = message(running.server)
    for sent in (whole[:40], whole[:-10], whole):  # in the header, in the body, before its answer
        with connect(running.server.url) as client:
            client.sendall(sent)
    assert answers(running)
    wait_for(lambda: running.total("pmgaft_in_flight_requests") == 0)


def test_a_client_that_sends_little_by_little_is_waited_for_and_others_are_not_kept(running: Running) -> None:
    whole = message(running.server)
    with connect(running.server.url) as slow:
        for start in range(0, len(whole), 200):
            slow.sendall(whole[start : start + 200])
            if start < 1000:
                assert answers(running)
        assert slow.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_length_that_never_comes_holds_nothing_but_its_connection(running: Running) -> None:
    head, _, body = message(running.server).partition(b"\r\n\r\n")
    longer = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % (len(body) + 1000))
    assert longer != head
    with connect(running.server.url) as client:
        client.sendall(longer + b"\r\n\r\n" + body)
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert running.total("pmgaft_in_flight_requests") == 0
        assert answers(running)


@pytest.fixture(scope="module")
def impatient(served_bundle: Path) -> Iterator[Server]:
    options = ServeOptions(bundle=served_bundle, port=0, start_seconds=400, receive_seconds=2)
    with serving(options) as server:
        yield server


def test_a_request_that_is_not_whole_in_time_is_given_up_and_no_other(impatient: Server) -> None:
    with ExitStack() as stack:
        stopped, trickling, idle = (stack.enter_context(connect(impatient.url)) for _ in range(3))
        whole = message(impatient)
        idle.sendall(whole)
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")
        stopped.sendall(whole[:-10])
        trickling.sendall(whole[:-40])
        with suppress(ConnectionError):  # when it is given up
            for _ in range(30):
                time.sleep(0.1)
                trickling.sendall(b"a")
        for given_up in (stopped, trickling):
            answer = given_up.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"not whole within 2 seconds" in answer
        idle.sendall(whole)  # longer than that after its last request
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_request_that_the_server_itself_does_not_read_is_not_given_up(impatient: Server) -> None:
    worker = impatient.workers()[0]
    with connect(impatient.url) as client:
        os.kill(worker, signal.SIGSTOP)
        try:
            last = request({}, "Connection: close")
            client.sendall(request({}) + request({}) + last[:-10])
            time.sleep(3)
        finally:
            os.kill(worker, signal.SIGCONT)
        client.sendall(last[-10:])
        answer = read_to_the_end(client)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"] * 3


def test_a_client_that_reads_no_answer_is_read_no_further(running: Running) -> None:
    asked = request({"labels": [f"thing {number}" for number in range(1000)]})
    with connect(running.server.url) as client:
        client.settimeout(5)
        before = running.total("pmgaft_requests_total")
        with suppress(TimeoutError):
            for _ in range(2000):
                client.sendall(asked)
        answered = running.total("pmgaft_requests_total") - before
        assert 0 < answered < 200  # as many as lie in the sockets' buffers, and in none of TorchServe's
    assert answers(running)


def test_requests_in_a_row_on_one_connection_are_answered_in_their_order(running: Running) -> None:
    asked: list[Mapping[str, Any]] = [{"probe": {"eps": "1/255", "steps": 50, "restarts": 5}}, {}, {}]
    with connect(running.server.url) as client:
        for number, body in enumerate(asked):
            last = ["Connection: close"] if number == len(asked) - 1 else []
            client.sendall(request(body, f"X-Request-Id: number-{number}", *last))
        answer = read_to_the_end(client)
    assert re.findall(rb'"request_id":"number-(.)"', answer) == [b"0", b"1", b"2"]


def test_chunks_without_end_are_cut_off_at_the_servers_limit(running: Running) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n"
    most = 2 * running.server.options.settings.limits.request_bytes
    sent = 0
    with connect(running.server.url) as client, suppress(ConnectionError):
        client.sendall(head.encode())
        while sent < 4 * most:
            client.sendall(chunk)
            sent += 2**20
    assert sent <= most + 16 * 2**20  # what lies in the sockets' buffers
    assert answers(running)


def test_hundreds_of_idle_connections_leave_room_for_those_that_ask(running: Running) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(running.server.url)) for _ in range(IDLE)]
        for client in idle[::2]:
            client.sendall(b"POST ")
        assert answers(running)
    assert answers(running)


# The machine


def test_a_bundle_that_changes_while_it_is_served_changes_no_answer(running: Running, tmp_path: Path) -> None:
    bundle = shutil.copytree(running.server.options.bundle, tmp_path / "bundle")
    with serving(ServeOptions(bundle=bundle, port=0, start_seconds=400)) as server, Client(server.url) as client:
        before = client.classify(PNG, Question(labels=LABELS))
        for file in bundle.rglob("*"):
            if file.is_file():
                file.unlink()
        after = client.classify(PNG, Question(labels=[*LABELS, "a new label"]))
        assert after.model == before.model
        old = {one.label: one.similarity for one in before.predictions}
        assert all(abs(old.get(one.label, one.similarity) - one.similarity) < 1e-5 for one in after.predictions)

        os.kill(server.processes()["torchserve"], signal.SIGKILL)
        wait_for(lambda: not server.alive())
        with httpx.Client(trust_env=False, timeout=30) as http:
            assert http.get(server.metrics_url + "/healthz").status_code == 503
            assert http.get(server.metrics_url + "/readyz").status_code == 503
            assert "pmgaft_ready 0" in http.get(server.metrics_url + "/metrics").text
        state = server.state
    assert not state.exists()  # and every process of it is gone, or stop() would have waited


CLOCK = """
import itertools, time
jumps, real = itertools.cycle((0, 86_400 * 365, -86_400 * 3650)), time.time
time.time = lambda: real() + next(jumps)
"""


def test_a_worker_that_hangs_is_replaced_and_a_clock_that_jumps_disturbs_nobody(
    served_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK)  # of the workers: by a year, by minus ten, at every look
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = ServeOptions(bundle=served_bundle, port=0, start_seconds=400, hang_seconds=5)
    with serving(options) as server, Client(server.url) as client:
        question = Question(labels=LABELS, probe={"steps": 2, "seconds": 20})
        assert client.classify(PNG, question).probe is not None
        first = server.workers()
        os.kill(first[0], signal.SIGSTOP)
        wait_for(lambda: server.workers() not in ([], first) and server.ready())
        assert client.classify(PNG, question).probe is not None
        assert server.workers() != first


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    where = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))  # short: sockets will lie in it
    words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        where.rmdir()
        pytest.skip("a small disk to fill needs root's right to mount one")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)
        where.rmdir()


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    assert shutil.disk_usage(disk).free == 0


def test_a_full_disk_stops_no_answer_no_probe_and_no_metrics(
    served_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(12) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        options = ServeOptions(bundle=served_bundle, port=0, start_seconds=400)
        with serving(options) as server, Client(server.url) as client:
            assert server.state.is_relative_to(disk)
            fill(disk)
            asked = [
                client.classify(PNG, Question(labels=[*LABELS, f"new {n}"], probe={"steps": 2} if n else None))
                for n in range(3)
            ]
            assert len(asked) == 3
            text = httpx.get(server.metrics_url + "/metrics", trust_env=False, timeout=30).text
            assert total(text, "pmgaft_requests_total", code="ok") >= 4
            assert server.ready()
