"""TorchServe's worker protocol, read from bytes however they are cut, and answered on one event loop."""

import asyncio
import socket
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # ts reads a file when it is imported, and leaves it open
    from ts.async_service import AsyncService
    from ts.context import Context
    from ts.protocol.otf_message_handler import retrieve_msg
    from ts.service import Service

    from pmgaft_serve import worker_loop
    from pmgaft_serve.handler import incoming
    from pmgaft_serve.worker_loop import Reader, Received

END = struct.pack("!i", -1)


def field(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def message(*requests: Received) -> bytes:
    """As TorchServe's front end writes it."""
    parts = [b"I"]
    for request in requests:
        parts.append(field(request.id.encode()))
        parts += [field(name.encode()) + field(value.encode()) for name, value in request.headers.items()] + [END]
        parts += [
            field(name.encode()) + field(b"image/jpeg") + field(value) for name, value in request.parameters.items()
        ] + [END]
    return b"".join([*parts, END])


def request(number: int, body: bytes = b"x") -> Received:
    return Received(id=f"id-{number}", headers={"Host": "h", "X-Ä": "ü"}, parameters={"body": body, "labels": b""})


def test_our_idea_of_the_protocol_is_torchserves() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(message(request(1, b"\x00" * 5000)))
        command, batch = retrieve_msg(theirs)
    headers, inputs, ids = Service.retrieve_data_for_inference(batch)
    (found,) = Reader().feed(message(request(1, b"\x00" * 5000)))
    assert (command, ids[0], inputs[0]) == (b"I", found.id, found.parameters)
    sent = headers[0].get_request_properties()
    assert {name: sent[name] for name in found.headers} == found.headers


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None)
def test_requests_are_the_same_however_their_bytes_are_cut(bodies: list[bytes], data: st.DataObject) -> None:
    requests = [request(number, body) for number, body in enumerate(bodies)]
    stream = b"".join(message(one) for one in requests)
    reader, found, start = Reader(), [], 0
    while start < len(stream):
        size = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[start : start + size])
        start += size
    assert found == requests


@pytest.mark.parametrize(
    "junk", [b"L", b"X", b"I" + struct.pack("!i", -2), b"I" + field(b"\xff\xfe") + END + END + END]
)
def test_what_is_not_the_protocol_is_an_error(junk: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Reader().feed(junk)


class FakeService:
    """What TorchServe hands to its loop: a handler, the model's context and the front end's socket."""

    def __init__(self, end: socket.socket, entry: Any) -> None:
        self.cl_socket = end
        self._entry_point = entry
        self.context = Context("m", "/", {}, 1, None, "0.12.0", metrics=object())


def answers(front: socket.socket, count: int) -> dict[str, tuple[int, bytes]]:
    """Responses as TorchServe's front end reads them: id -> (status, body)."""
    file = front.makefile("rb")

    def value() -> bytes:
        (length,) = struct.unpack("!i", file.read(4))
        return file.read(max(0, length))

    found = {}
    for _ in range(count):
        file.read(4)
        value()  # code and message
        name = value().decode()
        value()  # content type
        (status,) = struct.unpack("!i", file.read(4))
        value()  # phrase
        (headers,) = struct.unpack("!i", file.read(4))
        for _ in range(2 * headers):
            value()
        found[name] = status, value()
        assert file.read(4) == END
    return found


def test_each_request_is_answered_on_its_own_whatever_the_others_do() -> None:
    front, back = socket.socketpair()
    slow = asyncio.Event()

    async def handle(data: list[dict[str, bytes]], context: Context) -> list[bytes]:
        body = data[0]["body"]
        if body == b"slow":
            await slow.wait()
        if body == b"last":
            slow.set()
        if body == b"bad":
            raise RuntimeError("secret")
        context.set_response_status(201, "Created", 0)
        context.set_response_header(0, "X-A", "b")
        return [body + str(context.get_request_id(0)).encode()]

    with front, back, ThreadPoolExecutor(1) as thread:
        loop = thread.submit(lambda: asyncio.run(worker_loop._run(FakeService(back, handle), asyncio.sleep(0))))
        bodies = [b"slow", b"bad", b"quick" * 100_000, b"last"]
        front.sendall(b"".join(message(request(number, body)) for number, body in enumerate(bodies)))
        found = answers(front, 4)
        front.shutdown(socket.SHUT_RDWR)
        loop.result(timeout=20)
    assert found["id-0"] == (201, b"slowid-0")
    assert found["id-1"][0] == 500
    assert b"secret" not in found["id-1"][1]
    assert found["id-2"] == (201, b"quick" * 100_000 + b"id-2")
    assert next(iter(found)) != "id-0"  # the slow one did not hold up the others


def test_a_worker_runs_our_loop_in_the_place_of_torchserves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncService, "run", None)
    beside: list[str] = []

    async def other() -> None:
        beside.append("ran")

    worker_loop.install(other)
    front, back = socket.socketpair()

    async def handle(data: list[dict[str, bytes]], context: Context) -> list[bytes]:
        return [b"answer"]

    with front, back, ThreadPoolExecutor(1) as thread:
        loop = thread.submit(AsyncService(FakeService(back, handle)).run)
        front.sendall(message(request(7)))
        assert answers(front, 1) == {"id-7": (200, b"answer")}
        front.close()
        assert loop.result(timeout=20) is None
    assert beside == ["ran"]


def received(headers: dict[str, str], **fields: bytes) -> Any:
    """As the service gets it."""
    taken = Received(id="torchserve's", headers=headers, parameters=fields)
    service = FakeService(socket.socket(), None)
    service.cl_socket.close()
    return incoming(taken.parameters, worker_loop._context(service.context, taken))


def test_a_request_is_called_by_its_clients_id_if_that_can_be_written_in_a_log() -> None:
    assert received({"host": "h"}).request_id == "torchserve's"
    assert received({"X-REQUEST-ID": "client-1/a"}).request_id == "client-1/a"
    for odd in ("", "a b", "a\nb", "ü", "x" * 129):
        assert received({"x-request-id": odd}).request_id == "torchserve's"


def test_what_comes_by_grpc_has_its_headers_among_the_fields() -> None:
    fields = {"authorization": b"Bearer t", "x-request-id": b"7", "labels": b"a", "image": b"i"}
    by_grpc = received({}, **fields)
    assert (by_grpc.authorization, by_grpc.request_id) == ("Bearer t", "7")
    assert by_grpc.fields == {"labels": b"a", "image": b"i"}
    by_http = received({"Host": "h", "Content-Type": "multipart/form-data"}, **fields)
    assert (by_http.authorization, by_http.fields) == (None, fields)
