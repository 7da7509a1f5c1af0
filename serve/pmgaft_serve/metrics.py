"""Every Prometheus series, once, in a table; and the exporter that adds up what all workers wrote.

Workers write into one directory (prometheus_client's multiprocess mode: the environment variable
PROMETHEUS_MULTIPROC_DIR, set before the first of them starts). The exporter, in the launcher, sums the files of all
workers that ever lived, so that counters survive a worker's death, and appends TorchServe's own series. Label values
come from closed lists: never what a client sent.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Literal

import httpx
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PROBE_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0)

STAGES = ("queue", "decode", "text", "image", "rank", "probe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One series. `mode`: how a gauge's values of several workers become one."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    mode: Literal["max", "livesum"] = "max"


SERIES: tuple[Series, ...] = (
    Series(
        name="pmgaft_requests_total",
        kind="counter",
        unit="requests",
        labels=("outcome", "code"),
        help="Requests answered. outcome: ok, partial (some of several images failed), refused (4xx), failed (5xx); "
        "code: ok, or the error's code.",
    ),
    Series(
        name="pmgaft_request_seconds",
        kind="histogram",
        unit="seconds",
        labels=("outcome",),
        buckets=SECONDS,
        help="From a request's arrival in the worker to its answer.",
    ),
    Series(
        name="pmgaft_stage_seconds",
        kind="histogram",
        unit="seconds",
        labels=("stage",),
        buckets=SECONDS,
        help=f"Time of one stage of a request. stage: {', '.join(STAGES)}.",
    ),
    Series(
        name="pmgaft_batch_images",
        kind="histogram",
        unit="images",
        buckets=(1, 2, 4, 8, 16, 32, 64),
        help="Images that the encoder was given at once.",
    ),
    Series(
        name="pmgaft_in_flight_requests",
        kind="gauge",
        unit="requests",
        mode="livesum",
        help="Requests accepted and not yet answered.",
    ),
    Series(
        name="pmgaft_labels_per_request",
        kind="histogram",
        unit="labels",
        buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
        help="Labels in one request.",
    ),
    Series(
        name="pmgaft_label_cache_hits_total", kind="counter", unit="labels", help="Labels whose features were kept."
    ),
    Series(
        name="pmgaft_label_cache_misses_total", kind="counter", unit="labels", help="Labels that had to be encoded."
    ),
    Series(
        name="pmgaft_texts_encoded_total",
        kind="counter",
        unit="texts",
        help="Texts (a label in a template) that the text encoder was given.",
    ),
    Series(
        name="pmgaft_label_cache_labels",
        kind="gauge",
        unit="labels",
        mode="livesum",
        help="Label features kept, each in its templates.",
    ),
    Series(name="pmgaft_label_cache_bytes", kind="gauge", unit="bytes", mode="livesum", help="Size of what is kept."),
    Series(
        name="pmgaft_rejected_total",
        kind="counter",
        unit="requests",
        labels=("reason",),
        help="Requests turned away without work. reason: overloaded, draining, probe_busy, probe_disabled, "
        "token_invalid.",
    ),
    Series(
        name="pmgaft_probes_total",
        kind="counter",
        unit="probes",
        labels=("verdict", "eps"),
        help="Probed images by verdict (broken, not_broken, inconclusive) and the smallest of 0.5/255, 1/255, 2/255, "
        "4/255, 8/255, inf that is not below the probe's eps.",
    ),
    Series(
        name="pmgaft_probe_seconds",
        kind="histogram",
        unit="seconds",
        labels=("verdict",),
        buckets=PROBE_SECONDS,
        help="Time of one probe, all its images together, without waiting for its turn.",
    ),
    Series(
        name="pmgaft_probe_gradients_total",
        kind="counter",
        unit="gradients",
        help="Input gradients computed by probes, one image and one step each.",
    ),
    Series(
        name="pmgaft_model_info",
        kind="gauge",
        unit="1",
        labels=("name", "bundle", "engine", "format", "version"),
        help="Always 1; the labels say what is served.",
    ),
    Series(
        name="pmgaft_worker_starts_total",
        kind="counter",
        unit="workers",
        help="Workers that loaded the model, restarts too.",
    ),
)

_EPS_BOUNDS = (0.5, 1, 2, 4, 8)


def eps_label(eps: float) -> str:
    """One of six values for any eps, so that clients cannot make series without end."""
    bound = next((bound for bound in _EPS_BOUNDS if eps * 255 <= bound + 1e-9), None)
    return "inf" if bound is None else f"{bound:g}/255"


class Metrics:
    """The table's series, ready to be moved: `metrics.counter(name, **labels).inc()` and so on."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for series in SERIES:
            name, text, labels = series.name, series.help, series.labels
            if series.kind == "counter":
                self._counters[name] = Counter(name, text, labels, registry=registry)
            elif series.kind == "gauge":
                self._gauges[name] = Gauge(name, text, labels, registry=registry, multiprocess_mode=series.mode)
            else:
                self._histograms[name] = Histogram(name, text, labels, registry=registry, buckets=series.buckets)

    def count(self, name: str, /, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Put a value into a histogram."""
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)


def collect(directory: Path) -> str:
    """All workers' series, added up, in Prometheus' text format. directory: the workers' PROMETHEUS_MULTIPROC_DIR."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(re.sub(r"\D", "", file.stem.rpartition("_")[2]))
        if not _alive(pid):
            mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    return prometheus_client.generate_latest(registry).decode()


def total(text: str, name: str, /, **labels: str) -> float:
    """The sum of all samples of `name` in Prometheus' text format whose labels include these."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = (line for line in text.splitlines() if re.match(rf"{re.escape(name)}[{{ ]", line))
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """What the exporter serves. ready: whether a request would be answered now; alive: whether TorchServe runs."""

    directory: Path
    torchserve_metrics: str
    ready: Callable[[], bool]
    alive: Callable[[], bool]
    documents: Mapping[str, object] = field(default_factory=dict)

    def page(self, path: str) -> tuple[int, str, str]:
        """(status, content type, body) of /metrics, /healthz, /readyz, and of each document, as JSON."""
        if path == "/metrics":
            return 200, CONTENT_TYPE, collect(self.directory) + self._torchserve()
        if path in ("/healthz", "/readyz"):
            good = self.alive() if path == "/healthz" else self.ready()
            return 200 if good else 503, "text/plain; charset=utf-8", "ok\n" if good else "not ready\n"
        if path in self.documents:
            return 200, "application/json", json.dumps(self.documents[path])
        known = ", ".join(("/metrics", "/healthz", "/readyz", *self.documents))
        return 404, "text/plain; charset=utf-8", f"here are {known}\n"

    def _torchserve(self) -> str:
        try:
            answer = httpx.get(self.torchserve_metrics, timeout=2, trust_env=False)
        except httpx.HTTPError:
            return ""  # our own series are worth having without it
        return answer.text if answer.is_success else ""


class Exporter:
    """Serves `pages` over HTTP from a thread of its own, from construction until `close`."""

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content_type, text = pages.page(self.path.partition("?")[0])
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Scrapes are not news."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
