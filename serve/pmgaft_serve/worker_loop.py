"""The loop of a TorchServe worker in asynchronous mode: requests from the front end's socket to the handler, and back.

Takes the place of TorchServe 0.12's own (`AsyncService.run`), which costs more than the rest of a small model's
request: it reads every field by several system calls in a thread of its own, formats each request's bytes for a log
line nobody sees (16 ms for a 4 MB picture), copies the whole context deeply, prints a line, and hands every answer
through two queues and a third thread. TorchServe gets no more releases, so there is nobody to send the mend to.

The protocol is TorchServe's (ts/protocol/otf_message_handler.py): big-endian 32-bit lengths, -1 ends a list.

    request     "I", then each request of the batch, then -1
      each      id, headers (name, value)* -1, parameters (name, content type, value)* -1
"""

from __future__ import annotations

import asyncio
import copy
import logging
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ts.async_service import AsyncService
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One request as the front end sent it. headers: the request's, by name as the client spelled it."""

    id: str
    headers: dict[str, str]
    parameters: dict[str, bytes]


def install(beside: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Let this process's worker run this loop instead of TorchServe's, and `beside` on the same loop."""
    AsyncService.run = lambda service: asyncio.run(_run(service.service, beside()))


class Reader:
    """Bytes as they come -> whole requests."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = 0  # bytes, before it is worth looking again: else a long message would be copied many times

    def feed(self, data: bytes) -> list[Received]:
        """The requests that are complete now. Raises: ValueError where this is not TorchServe's protocol."""
        self._buffer += data
        found: list[Received] = []
        while self._buffer and len(self._buffer) >= self._needed:
            try:
                batch, end = _parse(self._buffer)
            except _IncompleteError as missing:
                self._needed = missing.end
                break
            found += batch
            self._needed = 0
            del self._buffer[:end]
        return found


class _IncompleteError(Exception):
    """The rest is still on its way: what is being read ends at byte `end` of the buffer."""

    def __init__(self, end: int) -> None:
        super().__init__(end)
        self.end = end


class _Cursor:
    """Fields one after another."""

    def __init__(self, buffer: bytearray, position: int) -> None:
        self.buffer = buffer
        self.position = position

    def length(self) -> int:
        end = self.position + _LENGTH.size
        if end > len(self.buffer):
            raise _IncompleteError(end)
        (value,) = _LENGTH.unpack_from(self.buffer, self.position)
        self.position = end
        if value < -1:
            raise ValueError(f"a field of {value} bytes")
        return int(value)

    def field(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.buffer):
            raise _IncompleteError(end)
        start, self.position = self.position, end
        with memoryview(self.buffer) as view:
            return bytes(view[start:end])

    def next(self) -> bytes:
        return self.field(max(0, self.length()))

    def items(self, read: Callable[[bytes], None]) -> None:
        while (length := self.length()) != -1:
            read(self.field(length))


def _parse(buffer: bytearray) -> tuple[list[Received], int]:
    """The first message's requests, and where it ends."""
    if buffer[:1] != b"I":
        raise ValueError(f"command {bytes(buffer[:1])!r}")
    cursor = _Cursor(buffer, 1)
    batch: list[Received] = []

    def request(name: bytes) -> None:
        headers: dict[str, str] = {}
        parameters: dict[str, bytes] = {}

        def header(name: bytes) -> None:
            headers[name.decode()] = cursor.next().decode()

        def parameter(name: bytes) -> None:
            cursor.next()  # its content type
            parameters[name.decode()] = cursor.next()

        cursor.items(header)
        cursor.items(parameter)
        batch.append(Received(id=name.decode(), headers=headers, parameters=parameters))

    cursor.items(request)
    return batch, cursor.position


class _FrontEnd(asyncio.Protocol):
    """The connection to TorchServe's front end."""

    def __init__(self, take: Callable[[Received], None]) -> None:
        self._take = take
        self._reader = Reader()
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for request in self._reader.feed(data):
                self._take(request)
        except ValueError as error:
            logger.error("TorchServe's front end sent what cannot be read: %s", error)
            self.closed.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def _run(service: Any, beside: Coroutine[Any, Any, None]) -> None:
    """Answer until the front end hangs up. service: a ts.service.Service with a handler and the front end's socket."""
    other = asyncio.create_task(beside)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(request: Received) -> None:
        context = _context(service.context, request)
        try:
            answer = await service._entry_point([request.parameters], context)
        except Exception:
            logger.exception("the handler failed on request %s", request.id)
            response = create_predict_response(None, {0: request.id}, "Prediction failed", 500)
        else:
            response = create_predict_response(answer, {0: request.id}, "Prediction success", 200, context=context)
        if front_end.transport is not None and not front_end.transport.is_closing():
            front_end.transport.write(response)

    def take(request: Received) -> None:
        task = asyncio.create_task(serve(request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    service.cl_socket.setblocking(False)
    loop = asyncio.get_running_loop()
    _, front_end = await loop.create_connection(lambda: _FrontEnd(take), sock=service.cl_socket)
    await front_end.closed
    other.cancel()


def _context(model: Context, request: Received) -> Context:
    """The model's context with one request in it; what belongs to the model is shared."""
    context = copy.copy(model)
    context.request_ids = {0: request.id}
    context.request_processor = [RequestProcessor(request.headers)]
    return context
