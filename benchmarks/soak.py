"""Mixed traffic for an hour, with faults: nothing lost, no 5xx of our own making, memory and files bounded.

python benchmarks/soak.py [--minutes 60] [--model mini] [--quick]

Clients ask a `pmgaft serve` of two workers for what people ask: photographs and known labels, several pictures, new
labels, label sets, probes; they send broken pictures and forms that cannot be decoded, and hang up now and then. Every
tenth of the time something is broken, in turn: a worker is killed, a worker is stopped for five seconds, a hundred
connections lie idle.

Writes results/soak.json, and into results/summary.json:
ops.soak_lost              requests that got no answer, but for those in flight when a worker was killed
ops.soak_unexpected_5xx    5xx outside the time in which a killed worker is replaced
ops.soak_memory_growth_mb  resident size of TorchServe and both workers, last tenth less second tenth: sums of medians
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
import psutil
from record import RESULTS, machine, summarise

from pmgaft_export.bundle import open_bundle
from pmgaft_export.shipped import bundle_for
from pmgaft_serve.bench import picture
from pmgaft_serve.label_sets import LabelSet
from pmgaft_serve.protocol import PATH
from pmgaft_serve.sampling import SamplePolicy
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import ServeOptions, Server, serving

CLIENTS = 6
CACHE_BYTES = 32 * 2**20  # of label features: full within the first tenth, so that what grows later is not the cache
TENTHS = 10
REPLACED_SECONDS = 60.0
"""After a kill: how long a worker may take to be there again."""
KNOWN = [f"thing {number}" for number in range(200)]
PETS = LabelSet(name="pets", labels=("cat", "dog", "bird"))
BAD_FORM = b"".join([
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + bytes(2**20),
    b"\r\n--x\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--x--\r\n",
])  # fmt: skip
BAD_FORM_TYPE = {"Content-Type": "multipart/form-data; boundary=x"}


@dataclass(slots=True)
class Seen:
    """What became of the requests. killed: times of kills, of the monotonic clock."""

    statuses: Counter[int] = field(default_factory=Counter)
    killed: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    in_flight_at_kills: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, began: float, status: int | None, what: str) -> None:
        """One request; status None: it got no answer."""
        ended = time.monotonic()
        with self.lock:
            near_a_kill = any(began - REPLACED_SECONDS < kill < ended for kill in self.killed)
            if status is None:
                if near_a_kill:
                    self.in_flight_at_kills += 1
                else:
                    self.lost.append(what)
                return
            self.statuses[status] += 1
            if status >= 500 and not near_a_kill:
                self.unexpected.append(f"{what}: {status}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The server's processes at one time: bytes, open files, files of metrics."""

    seconds: float
    resident: Mapping[str, int]
    files: int
    metric_files: int


def requests(chance: random.Random) -> tuple[str, Mapping[str, Any]]:
    """What one client asks now: a name, and the JSON; none for a form that cannot be decoded."""
    photo, small = picture(500, 375), picture(64, 64)
    image = base64.b64encode(photo if chance.random() < 0.5 else small).decode()
    labels: list[str] | str = chance.sample(KNOWN, 10)
    drawn = chance.random()
    if drawn < 0.03:
        return "probe", {"image": image, "labels": labels, "probe": {"eps": "1/255", "steps": chance.choice([5, 20])}}
    if drawn < 0.06:
        fresh = [f"new {chance.random()} {number}" for number in range(chance.choice([10, 300]))]
        return "new labels", {"image": image, "labels": fresh}
    if drawn < 0.12:
        return "several", {"images": [image, "AAAA", image], "labels": labels}
    if drawn < 0.16:
        return "broken", {"image": image[: len(image) // 2 // 4 * 4], "labels": labels}
    if drawn < 0.18:
        return "bad form", {}
    if drawn < 0.28:
        return "set", {"image": image, "labels": "@pets", "top_k": 1}
    return "plain", {"image": image, "labels": labels}


def ask_on(server: Server, seen: Seen, stop: threading.Event, seed: int) -> None:
    """One client, until told to stop."""
    chance = random.Random(seed)
    with httpx.Client(trust_env=False, timeout=300) as client:
        while not stop.is_set():
            name, content = requests(chance)
            if chance.random() < 0.01:
                hang_up(server)
            body = {"json": content} if content else {"content": BAD_FORM, "headers": BAD_FORM_TYPE}
            began = time.monotonic()
            try:
                status: int | None = client.post(server.url + PATH, **body).status_code
            except httpx.HTTPError as error:
                status, name = None, f"{name}: {type(error).__name__}"
            seen.note(began, status, name)


def hang_up(server: Server) -> None:
    """A request that is left before it is whole."""
    parts = urlsplit(server.url)
    with suppress(OSError), socket.create_connection((parts.hostname or "", parts.port or 80), timeout=10) as client:
        client.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())


def a_worker(server: Server) -> int:
    """The process id of one that lives; one that was killed is named for a while yet."""
    while True:
        for worker in server.workers():
            if psutil.pid_exists(worker):
                return worker
        time.sleep(0.1)


def kill_a_worker(server: Server, seen: Seen) -> None:
    worker = a_worker(server)
    with seen.lock:
        seen.killed.append(time.monotonic())
    os.kill(worker, signal.SIGKILL)


def stop_a_worker(server: Server, _: Seen) -> None:
    worker = a_worker(server)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(5)
    os.kill(worker, signal.SIGCONT)


def idle(server: Server, _: Seen) -> None:
    parts = urlsplit(server.url)
    with ExitStack() as stack:
        for _number in range(100):
            stack.enter_context(socket.create_connection((parts.hostname or "", parts.port or 80), timeout=10))
        time.sleep(5)


FAULTS: tuple[Callable[[Server, Seen], None], ...] = (kill_a_worker, stop_a_worker, idle)


def look(server: Server, began: float) -> Sample:
    """What the machine tells of the server's processes, after a scrape as Prometheus makes them."""
    httpx.get(server.metrics_url + "/metrics", trust_env=False, timeout=60).raise_for_status()
    resident, files = {}, 0
    for name, pid in server.processes().items():
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            resident[name] = process.memory_info().rss
            files += process.num_fds()
    metric_files = len(list((server.state / "metrics").iterdir()))
    return Sample(seconds=time.monotonic() - began, resident=resident, files=files, metric_files=metric_files)


def by_tenth(samples: list[Sample], seconds: float) -> list[dict[str, float]]:
    """Of each tenth of the time: each process's median resident size in megabytes, of samples with all processes."""
    whole = max(len(sample.resident) for sample in samples)
    tenths = list[dict[str, float]]()
    for tenth in range(TENTHS):
        first, last = tenth * seconds / TENTHS, (tenth + 1) * seconds / TENTHS
        sizes = [s.resident for s in samples if first <= s.seconds < last and len(s.resident) == whole]
        tenths.append({name: round(statistics.median(s[name] for s in sizes) / 2**20, 1) for name in sizes[0]})
    return tenths


@click.command()
@click.option("--minutes", default=60.0, show_default=True)
@click.option("--model", default="mini", show_default=True)
@click.option("--quick", is_flag=True, help="A minute and a half; nothing is kept.")
def main(minutes: float, model: str, quick: bool) -> None:
    """Run, print, write JSON."""
    seconds = 90.0 if quick else 60 * minutes
    bundle = open_bundle(bundle_for(model))
    settings = Settings(sample=SamplePolicy(rate=0.01), cache_bytes=CACHE_BYTES)
    seen, stop, samples = Seen(), threading.Event(), list[Sample]()
    options = ServeOptions(bundle=bundle.directory, port=0, workers=2, sets=(PETS,), settings=settings)
    with serving(options) as server:
        began = time.monotonic()
        clients = [threading.Thread(target=ask_on, args=(server, seen, stop, seed)) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        for tenth in range(TENTHS):
            while time.monotonic() - began < (tenth + 1) * seconds / TENTHS:
                samples.append(look(server, began))
                time.sleep(min(5.0, seconds / TENTHS / 4))
            if 1 < tenth < TENTHS - 2:  # the first and the last tenths are for comparing
                fault = FAULTS[(tenth - 2) % len(FAULTS)]
                click.echo(f"{time.monotonic() - began:6.0f} s: {fault.__name__}; so far {dict(seen.statuses)}")
                fault(server, seen)
        stop.set()
        for client in clients:
            client.join()
        last = look(server, began)
    resident = by_tenth(samples, seconds)
    figures = {
        "ops.soak_lost": len(seen.lost),
        "ops.soak_unexpected_5xx": len(seen.unexpected),
        "ops.soak_memory_growth_mb": round(sum(resident[-1].values()) - sum(resident[1].values()), 1),
    }
    content = {
        "model": model,
        "seconds": seconds,
        "machine": machine(),
        "figures": figures,
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "kills": len(seen.killed),
        "in_flight_at_kills": seen.in_flight_at_kills,
        "lost": seen.lost[:100],
        "unexpected": seen.unexpected[:100],
        "open_files": {"second_tenth": samples[len(samples) // TENTHS].files, "end": last.files},
        "metric_files": {"second_tenth": samples[len(samples) // TENTHS].metric_files, "end": last.metric_files},
        "resident_mb_by_tenth": resident,
    }
    click.echo(json.dumps(content, indent=1))
    if quick:
        return
    (RESULTS / "soak.json").write_text(json.dumps(content, indent=1) + "\n")
    summarise(figures)


if __name__ == "__main__":
    main()
