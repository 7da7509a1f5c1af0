"""A load generator: prepared requests over keep-alive connections, in a closed or an open loop.

Closed loop (`rate` None): `concurrency` clients, each of which asks again as soon as it was answered. Open loop:
requests are due at a fixed rate whatever the server does, and each one's time counts from when it was due, so that a
server that stalls is charged for everybody who had to wait (Tene, "How NOT to measure latency", 2013).

The client shares the machine with the server more often than not, so it is made to cost little: messages are bytes made
beforehand, and an answer is read as far as its status, its length, and, where it is a mistake, its code.
"""

from __future__ import annotations

import asyncio
import gc
import io
import json
import math
import random
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from pmgaft.errors import InputError, ServerError

from .protocol import PATH

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
_BOUNDARY = "pmgaft-bench-7d1f0e5b"
_LONGEST_HEAD = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go. path: of one request, such as "/predictions/pmgaft"."""

    host: str
    port: int
    path: str
    tls: bool = False

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, and how fast.

    message: the bytes of request number n, a whole HTTP/1.1 message for `target`. concurrency: requests in flight at
    most. seconds: measured, after `warmup` seconds that are not. rate: requests a second (open loop); None: closed
    loop. requests: after so many, all of them measured, it ends, if not before. timeout: seconds until a request counts
    as not answered.
    """

    target: Target
    message: Callable[[int], bytes]
    concurrency: int
    seconds: float
    warmup: float = 1.0
    rate: float | None = None
    requests: int | None = None
    timeout: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came back within the measured time.

    requests: that were answered with 200, `throughput` of them a second. latency_ms: theirs, by quantile, mean, max;
    refusal_ms: the same of all other answers.
    statuses: answers by HTTP status. codes: mistakes by their code. unanswered: by what happened instead.
    client_cpu_share: processor seconds of this process for each second: near 1, the client is what was measured.
    """

    concurrency: int
    rate: float | None
    seconds: float
    requests: int
    throughput: float
    latency_ms: Mapping[str, float]
    refusal_ms: Mapping[str, float]
    statuses: Mapping[str, int]
    codes: Mapping[str, int] = field(default_factory=dict)
    unanswered: Mapping[str, int] = field(default_factory=dict)
    client_cpu_share: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def target_of(url: str, path: str = PATH) -> Target:
    """Raises: InputError (url_invalid) unless `url` is http or https and names a host."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        message = f"{url!r} is no address of a server; write it like http://127.0.0.1:8080"
        raise InputError(message, field="url", code="url_invalid")
    tls = parts.scheme == "https"
    return Target(host=parts.hostname, port=port or (443 if tls else 80), path=parts.path.rstrip("/") + path, tls=tls)


def http_message(target: Target, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole POST request."""
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.authority}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def form_message(
    target: Target,
    image: bytes,
    labels: Sequence[str] | str,
    headers: Mapping[str, str] | None = None,
    **fields: str,
) -> bytes:
    """A request as a multipart form: the picture, the labels (a list, or "@NAME"), further fields as they are."""
    fields = {"labels": labels if isinstance(labels, str) else json.dumps(list(labels)), **fields}
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
        + image
    ]
    for name, value in fields.items():
        parts.append(f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    body = b"\r\n".join(parts) + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return http_message(target, body, f"multipart/form-data; boundary={_BOUNDARY}", headers)


def rotating(messages: Sequence[bytes]) -> Callable[[int], bytes]:
    """Prepared messages, again and again."""
    return lambda number: messages[number % len(messages)]


def drawn(labels: Sequence[str], count: int, lists: int, seed: int = 0) -> list[list[str]]:
    """`lists` lists of `count` different labels each, drawn at random."""
    chance = random.Random(seed)
    return [chance.sample(list(labels), count) for _ in range(lists)]


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A made-up photograph as JPEG, quality 90: a gradient, shapes and a camera's noise."""
    rng = np.random.default_rng(seed)
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    waves = np.sin(across * rng.uniform(3, 40, size=3) + down * rng.uniform(3, 40, size=3))
    pixels = 128 + 60 * waves + 40 * (across - down) + rng.normal(0, 6, size=(height, width, 3))
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def run(load: Load) -> Report:
    """Send the load and report. Raises: ServerError (not_reachable) if nobody listens there."""
    gc.collect()
    gc.freeze()  # else a look through all objects would stop the clients, and be taken for the server's doing
    try:
        return asyncio.run(_run(load))
    finally:
        gc.unfreeze()


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` of all: nearest rank. ordered: ascending, not empty."""
    return ordered[max(1, math.ceil(round(share * len(ordered), 9))) - 1]


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    code: str | None
    close: bool


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: asyncio.Future[_Answer] | None = None
        self._head: tuple[int, bool, int] | None = None  # status, whether it will close, length of head and body
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._fail(error or ConnectionResetError("closed"))

    def send(self, message: bytes) -> asyncio.Future[_Answer]:
        """The answer to one request, to be awaited before the next."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return self._waiting

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            if self._head is None:
                self._head = self._read_head()
            if self._head is None or len(self._buffer) < self._head[2]:
                return
            status, close, end = self._head
            answer = _Answer(status, None if status == 200 else _code(bytes(self._buffer[:end])), close)
        except ValueError as error:
            self._fail(error)
            self.close()
            return
        del self._buffer[:end]
        self._head = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def _read_head(self) -> tuple[int, bool, int] | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _LONGEST_HEAD:
                raise ValueError("not HTTP")
            return None
        first, *rest = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        if "content-length" not in headers:
            raise ValueError("no Content-Length")
        status = int(first.split(" ", 2)[1])
        close = headers.get("connection", "").lower() == "close"
        return status, close, end + 4 + int(headers["content-length"])

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)


def _code(answer: bytes) -> str:
    try:
        return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "none"


class _Run:
    """One load being sent."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.idle: deque[_Connection] = deque()
        self.everyone: set[_Connection] = set()
        self.sent = 0
        self.latencies: list[float] = []
        self.refusals: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self.begin = self.end = 0.0

    async def connection(self) -> _Connection:
        while self.idle:
            if (known := self.idle.pop()).open:
                return known
            self.everyone.discard(known)
        loop, target = asyncio.get_running_loop(), self.load.target
        tls = ssl.create_default_context() if target.tls else None
        _, fresh = await loop.create_connection(_Connection, target.host, target.port, ssl=tls)
        self.everyone.add(fresh)
        return fresh

    async def ask(self, due: float) -> bool:
        """One request. Returns: whether the server took it at all."""
        message = self.load.message(self.sent)
        self.sent += 1
        try:
            async with asyncio.timeout(self.load.timeout):
                connection = await self.connection()
                answer = await connection.send(message)
        except (OSError, ValueError, TimeoutError) as error:
            if self.begin <= time.perf_counter() < self.end:
                self.unanswered[type(error).__name__] += 1
            return not isinstance(error, ConnectionRefusedError)
        if answer.close:
            connection.close()
        else:
            self.idle.append(connection)
        now = time.perf_counter()
        if self.begin <= now < self.end:
            self.statuses[str(answer.status)] += 1
            if answer.status == 200:
                self.latencies.append(now - due)
            else:
                self.refusals.append(now - due)
            if answer.code is not None:
                self.codes[answer.code] += 1
        return True

    def all_sent(self) -> bool:
        return self.load.requests is not None and self.sent >= self.load.requests

    async def closed_client(self) -> None:
        while (now := time.perf_counter()) < self.end and not self.all_sent():
            if not await self.ask(now):
                await asyncio.sleep(0.05)  # nobody listens (yet, or any more)

    async def open_loop(self, start: float, rate: float) -> None:
        room = asyncio.Semaphore(self.load.concurrency)

        async def one(due: float) -> None:
            async with room:
                await self.ask(due)

        async with asyncio.TaskGroup() as tasks:
            number = 0
            while (due := start + number / rate) < self.end and number != self.load.requests:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(one(due))
                number += 1


async def _run(load: Load) -> Report:
    state = _Run(load)
    start = time.perf_counter()
    try:
        state.idle.append(await state.connection())
    except OSError as error:
        message = f"no server answers at {load.target.authority} ({error.strerror or type(error).__name__})"
        raise ServerError(message, code="not_reachable") from None
    state.begin = start + (load.warmup if load.requests is None else 0.0)
    state.end = state.begin + load.seconds
    processor = [0.0, 0.0]

    async def clock() -> None:
        for position, when in enumerate((state.begin, state.end)):
            await asyncio.sleep(max(0.0, when - time.perf_counter()))
            processor[position] = time.process_time()

    ticking = asyncio.create_task(clock())
    if load.rate is None:
        await asyncio.gather(*(state.closed_client() for _ in range(load.concurrency)))
    else:
        await state.open_loop(start, load.rate)
    if state.all_sent():
        ticking.cancel()
        processor[1] = time.process_time()
    else:
        await ticking
    for connection in state.everyone:
        connection.close()
    seconds = min(time.perf_counter(), state.end) - state.begin
    return _report(state, seconds, processor[1] - processor[0])


def _report(state: _Run, seconds: float, processor_seconds: float) -> Report:
    load = state.load
    return Report(
        concurrency=load.concurrency,
        rate=load.rate,
        seconds=round(seconds, 3),
        requests=len(state.latencies),
        throughput=round(len(state.latencies) / seconds, 3),
        latency_ms=_milliseconds(state.latencies),
        refusal_ms=_milliseconds(state.refusals),
        statuses=dict(sorted(state.statuses.items())),
        codes=dict(sorted(state.codes.items())),
        unanswered=dict(sorted(state.unanswered.items())),
        client_cpu_share=round(processor_seconds / seconds, 3),
    )


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """By quantile, mean and max; nothing of nothing."""
    if not seconds:
        return {}
    ordered = sorted(1000 * one for one in seconds)
    found = {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    found |= {"mean": sum(ordered) / len(ordered), "max": ordered[-1]}
    return {name: round(value, 3) for name, value in found.items()}
