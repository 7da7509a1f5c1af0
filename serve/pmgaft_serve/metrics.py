"""Every Prometheus series, once, in a table; and the exporter that adds up what all workers wrote.

Workers write into one directory (prometheus_client's multiprocess mode: the environment variable
PROMETHEUS_MULTIPROC_DIR, set before the first of them starts). The exporter, in the launcher, sums the files of all
workers that ever lived, so that counters survive a worker's death, adds what it sees of their processes, and appends
TorchServe's own series. Label values come from closed lists: never what a client sent.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from threading import Lock, Thread
from typing import Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from pmgaft import __version__

from .metric_files import fold_dead
from .protocol import STATUS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PROBE_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0)

BYTES = (1e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 3e7)
EPS = (*(size / 255 for size in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 16, 32)), 0.25, 0.5, 1.0, 2.0, 4.0)

STAGES = ("queue", "decode", "text", "image", "rank", "probe")
OUTCOMES = ("ok", "partial", "refused", "failed")
VERDICTS = ("broken", "not_broken", "inconclusive")
EPS_LABELS = ("0.5/255", "1/255", "2/255", "4/255", "8/255", "inf")
REJECTIONS = (
    "overloaded", "draining", "token_invalid",
    "probe_busy", "probe_rate", "probe_disabled", "probe_images_disabled", "probe_token_missing", "probe_token_invalid",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One series.

    labels: name -> its possible values; None where they name what is installed or served, and so change only with a
    start. help: what it is, a sentence. mode: how a gauge's values of several workers become one. by: who counts it,
    a worker, or the exporter in the moment of a scrape.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    mode: Literal["max", "livesum"] = "max"
    by: Literal["worker", "exporter"] = "worker"


SERIES: tuple[Series, ...] = (
    Series(
        name="pmgaft_requests_total",
        kind="counter",
        unit="requests",
        labels={"outcome": OUTCOMES, "code": ("ok", *STATUS)},
        help="Requests answered. outcome: ok, partial (some of several images failed), refused (4xx), failed (5xx); "
        "code: ok, or the error's.",
    ),
    Series(
        name="pmgaft_request_seconds",
        kind="histogram",
        unit="seconds",
        labels={"outcome": OUTCOMES},
        buckets=SECONDS,
        help="From a request's arrival in the worker to its answer.",
    ),
    Series(
        name="pmgaft_stage_seconds",
        kind="histogram",
        unit="seconds",
        labels={"stage": STAGES},
        buckets=SECONDS,
        help="Time of one stage of a request; queue: between decoding and the encoder, text: waiting included.",
    ),
    Series(
        name="pmgaft_in_flight_requests",
        kind="gauge",
        unit="requests",
        mode="livesum",
        help="Requests accepted and not yet answered.",
    ),
    Series(
        name="pmgaft_rejected_total",
        kind="counter",
        unit="requests",
        labels={"reason": REJECTIONS},
        help="Requests turned away without work; they are in pmgaft_requests_total, too.",
    ),
    Series(
        name="pmgaft_image_bytes",
        kind="histogram",
        unit="bytes",
        buckets=BYTES,
        help="Size of each image as it was sent.",
    ),
    Series(
        name="pmgaft_queue_images",
        kind="gauge",
        unit="images",
        mode="livesum",
        help="Decoded images that wait for the encoder.",
    ),
    Series(
        name="pmgaft_batch_images",
        kind="histogram",
        unit="images",
        buckets=(1, 2, 4, 8, 16, 32, 64),
        help="Images that the encoder was given at once.",
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
        name="pmgaft_label_cache_evictions_total",
        kind="counter",
        unit="labels",
        help="Label features that were forgotten to make room.",
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
        name="pmgaft_texts_encoded_total",
        kind="counter",
        unit="texts",
        help="Texts (a label in a template) that the text encoder was given.",
    ),
    Series(
        name="pmgaft_probes_total",
        kind="counter",
        unit="images",
        labels={"verdict": VERDICTS, "eps": EPS_LABELS},
        help="Images that clients had probed, by verdict; eps: the smallest of these not below the probe's own.",
    ),
    Series(
        name="pmgaft_probe_min_eps",
        kind="histogram",
        unit="pixel range (0 to 1)",
        labels={"norm": ("linf", "l2")},
        buckets=EPS,
        help="Smallest eps found to change an answer, where a probe searched for it and found one.",
    ),
    Series(
        name="pmgaft_probe_seconds",
        kind="histogram",
        unit="seconds",
        labels={"verdict": VERDICTS},
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
        name="pmgaft_probes_in_work",
        kind="gauge",
        unit="requests",
        mode="livesum",
        help="Requests with a probe that is running or waits for its turn.",
    ),
    Series(
        name="pmgaft_probe_batch_images",
        kind="histogram",
        unit="images",
        buckets=(1, 2, 4, 8, 16, 32),
        help="Images of one or more requests that were attacked at once.",
    ),
    Series(
        name="pmgaft_probe_samples_total",
        kind="counter",
        unit="images",
        labels={"outcome": ("probed", "dropped", "failed")},
        help="Images of ordinary traffic drawn for a probe; dropped: too many waited already.",
    ),
    Series(
        name="pmgaft_sampled_probes_total",
        kind="counter",
        unit="images",
        labels={"verdict": VERDICTS, "eps": None},
        help="Probed images of ordinary traffic by verdict, each once for every eps of --probe-sample-eps.",
    ),
    Series(
        name="pmgaft_sampled_min_eps",
        kind="histogram",
        unit="pixel range (0 to 1)",
        buckets=EPS,
        help="Smallest eps (linf) found to change an answer of ordinary traffic, where one was found.",
    ),
    Series(
        name="pmgaft_model_info",
        kind="gauge",
        unit="1",
        labels={"name": None, "bundle": None, "engine": None, "format": None, "version": None},
        help="Always 1; the labels say what is served, bundle by its hash.",
    ),
    Series(
        name="pmgaft_worker_starts_total",
        kind="counter",
        unit="workers",
        help="Workers that loaded the model, restarts too.",
    ),
    Series(
        name="pmgaft_ready",
        kind="gauge",
        unit="1",
        by="exporter",
        help="1 if a request would be answered now, else 0: what /readyz says.",
    ),
    Series(
        name="pmgaft_process_resident_bytes",
        kind="gauge",
        unit="bytes",
        labels={"process": None},
        by="exporter",
        help="Memory of one process: torchserve (the Java front end), or a worker by its place (Linux only).",
    ),
    Series(
        name="pmgaft_process_cpu_seconds_total",
        kind="counter",
        unit="seconds",
        labels={"process": None},
        by="exporter",
        help="Processor time of one process; begins again when a worker is replaced (Linux only).",
    ),
    Series(
        name="pmgaft_build_info",
        kind="gauge",
        unit="1",
        labels={"version": None, "torch": None, "onnxruntime": None, "torchserve": None},
        by="exporter",
        help="Always 1; the labels are the versions of pmgaft and of what it runs on.",
    ),
)

_EPS_BOUNDS = (0.5, 1, 2, 4, 8)


def outcome_of(code: str) -> str:
    """How a request is counted that ended with this error."""
    return "refused" if STATUS[code] < 500 else "failed"


def label_values(series: Series) -> list[dict[str, str]]:
    """Every combination of label values that can be; none where there are no labels, or no closed list of values."""
    if not series.labels or None in series.labels.values():
        return []
    if series.name == "pmgaft_requests_total":  # of all pairs, few exist
        pairs = [("ok", "ok"), ("partial", "ok"), *((outcome_of(code), code) for code in STATUS)]
        return [{"outcome": outcome, "code": code} for outcome, code in pairs]
    return [dict(zip(series.labels, values, strict=True)) for values in product(*filter(None, series.labels.values()))]


def eps_label(eps: float) -> str:
    """One of six values for any eps, so that clients cannot make series without end."""
    bound = next((bound for bound in _EPS_BOUNDS if eps * 255 <= bound + 1e-9), None)
    return "inf" if bound is None else f"{bound:g}/255"


class Metrics:
    """A worker's series, ready to be moved by name.

    Counters and histograms are there from the start, at 0 for every combination of their labels: the first failure,
    too, is a step upwards that Prometheus can see.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for series in SERIES:
            name, text, labels = series.name, series.help, tuple(series.labels)
            if series.by != "worker":
                continue
            if series.kind == "counter":
                self._counters[name] = Counter(name, text, labels, registry=registry)
                for values in label_values(series):
                    self._counters[name].labels(**values)
            elif series.kind == "gauge":
                self._gauges[name] = Gauge(name, text, labels, registry=registry, multiprocess_mode=series.mode)
            else:
                self._histograms[name] = Histogram(name, text, labels, registry=registry, buckets=series.buckets)
                for values in label_values(series):
                    self._histograms[name].labels(**values)

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


_ONE_SCRAPE = Lock()
"""Files come and go in a scrape."""


def collect(directory: Path) -> str:
    """All workers' series, added up, in Prometheus' text format. directory: the workers' PROMETHEUS_MULTIPROC_DIR."""
    with _ONE_SCRAPE:
        fold_dead(directory)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
        return prometheus_client.generate_latest(registry).decode()


def observed(*, ready: bool, processes: Mapping[str, int]) -> str:
    """The exporter's own series in Prometheus' text format. processes: ids by name; one that is gone is left out."""
    used = {name: usage for name, pid in processes.items() if (usage := _used(pid)) is not None}
    values: dict[str, list[tuple[dict[str, str], float]]] = {
        "pmgaft_ready": [({}, ready)],
        "pmgaft_process_resident_bytes": [({"process": name}, resident) for name, (resident, _) in used.items()],
        "pmgaft_process_cpu_seconds_total": [({"process": name}, seconds) for name, (_, seconds) in used.items()],
        "pmgaft_build_info": [(_versions(), 1)],
    }
    registry = CollectorRegistry()
    registry.register(_Seen([_family(series, values[series.name]) for series in SERIES if series.by == "exporter"]))
    return prometheus_client.generate_latest(registry).decode()


@dataclass(eq=False, slots=True)
class _Seen(Collector):
    families: list[Metric]

    def collect(self) -> list[Metric]:
        return self.families


def _family(series: Series, values: Sequence[tuple[dict[str, str], float]]) -> Metric:
    kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    family = kind(series.name, series.help, labels=tuple(series.labels))
    for labels, value in values:
        family.add_metric([labels[name] for name in series.labels], value)
    return family


@cache
def _versions() -> dict[str, str]:
    """Of the distributions that pmgaft_build_info names, by its labels."""
    return {
        "version": __version__,
        "torch": _version("torch"),
        "onnxruntime": _version("onnxruntime-gpu", "onnxruntime"),
        "torchserve": _version("torchserve"),
    }


def _version(*names: str) -> str:
    """Of the first of these distributions that is installed; "none" where none is."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return "none"


def _used(pid: int) -> tuple[int, float] | None:
    """(resident bytes, processor seconds) of a process; None where it is gone or there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE"), (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def total(text: str, name: str, /, **labels: str) -> float:
    """The sum of all samples of `name` in Prometheus' text format whose labels include these."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = (line for line in text.splitlines() if re.match(rf"{re.escape(name)}[{{ ]", line))
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """What the exporter serves.

    torchserve: its own series in Prometheus' text format, "" where it does not tell. ready: whether a request would be
    answered now; alive: whether TorchServe runs; processes: their ids by name. documents: path -> what is served there
    as JSON.
    """

    directory: Path
    torchserve: Callable[[], str]
    ready: Callable[[], bool]
    alive: Callable[[], bool]
    processes: Callable[[], Mapping[str, int]] = dict
    documents: Mapping[str, object] = field(default_factory=dict)

    def page(self, path: str) -> tuple[int, str, str]:
        """(status, content type, body) of /metrics, /healthz, /readyz, and of each document, as JSON."""
        if path == "/metrics":
            seen = observed(ready=self.ready(), processes=self.processes())
            return 200, CONTENT_TYPE, collect(self.directory) + seen + self.torchserve()
        if path in ("/healthz", "/readyz"):
            good = self.alive() if path == "/healthz" else self.ready()
            return 200 if good else 503, "text/plain; charset=utf-8", "ok\n" if good else "not ready\n"
        if path in self.documents:
            return 200, "application/json", json.dumps(self.documents[path])
        known = ", ".join(("/metrics", "/healthz", "/readyz", *self.documents))
        return 404, "text/plain; charset=utf-8", f"here are {known}\n"


class Exporter:
    """Serves `pages` over HTTP from a thread of its own, from construction until `close`."""

    def __init__(self, host: str, port: int, pages: Pages) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content_type, text = pages.page(self.path.partition("?")[0])
                body = text.encode()
                with suppress(ConnectionError):  # a scraper that did not wait
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
