"""Every series is in the table, several processes are one, and nothing a client sends becomes a label."""

import errno
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import httpx
import pytest

from pmgaft import __version__
from pmgaft_serve.metrics import SERIES, Exporter, Metrics, Pages, collect, eps_label, observed, outcome_of, total
from pmgaft_serve.protocol import STATUS

WORKER = """
import sys
from pmgaft_serve.metrics import Metrics
metrics = Metrics()
metrics.count("pmgaft_requests_total", int(sys.argv[1]), outcome="ok", code="ok")
metrics.observe("pmgaft_stage_seconds", 0.004, stage="image")
metrics.set("pmgaft_in_flight_requests", 3)
metrics.set("pmgaft_model_info", 1, name="m", bundle="b", engine="e", format="f", version="v")
print("written", flush=True)
sys.stdin.read()
"""


def start_worker(directory: Path, requests: int) -> subprocess.Popen[str]:
    """A process that counts, and stays until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(requests)],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def end(process: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        process.kill()
    process.communicate()


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str]]]:
    workers = start_worker(tmp_path, 2), start_worker(tmp_path, 5)
    yield workers
    for worker in workers:
        if worker.returncode is None:
            end(worker)


def test_two_processes_metrics_are_summed_and_those_of_a_killed_one_stay(
    tmp_path: Path, two_workers: tuple[subprocess.Popen[str], subprocess.Popen[str]]
) -> None:
    both = collect(tmp_path)
    assert total(both, "pmgaft_requests_total", outcome="ok") == 7
    assert total(both, "pmgaft_stage_seconds_bucket", stage="image", le="0.005") == 2
    assert total(both, "pmgaft_in_flight_requests") == 6
    assert total(both, "pmgaft_model_info") == 1
    end(two_workers[0], kill=True)
    later = collect(tmp_path)
    assert total(later, "pmgaft_requests_total", outcome="ok") == 7
    assert total(later, "pmgaft_in_flight_requests") == 3
    assert total(later, "pmgaft_model_info") == 1


def test_workers_that_die_again_and_again_leave_no_more_files_and_nothing_is_lost(tmp_path: Path) -> None:
    for number in range(4):
        end(start_worker(tmp_path, 10**number), kill=number % 2 == 0)
        text = collect(tmp_path)
        assert total(text, "pmgaft_requests_total", outcome="ok") == sum(10**n for n in range(number + 1))
        assert total(text, "pmgaft_stage_seconds_bucket", stage="image", le="0.005") == number + 1
        assert total(text, "pmgaft_stage_seconds_bucket", stage="image", le="0.001") == 0
        assert total(text, "pmgaft_stage_seconds_sum", stage="image") == pytest.approx(0.004 * (number + 1))
        assert total(text, "pmgaft_model_info") == 1
        assert total(text, "pmgaft_in_flight_requests") == 0
        assert {file.name for file in tmp_path.iterdir()} == {
            "counter_dead.db",
            "histogram_dead.db",
            "gauge_max_dead.db",
        }


def test_on_a_full_disk_a_dead_workers_files_stay_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    end(start_worker(tmp_path, 7), kill=True)
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        for _ in range(2):
            assert total(collect(tmp_path), "pmgaft_requests_total", outcome="ok") == 7
        assert len([file for file in tmp_path.iterdir() if "dead" not in file.name]) == 3
    assert total(collect(tmp_path), "pmgaft_requests_total", outcome="ok") == 7
    assert len(list(tmp_path.iterdir())) == 3


def test_the_table_follows_prometheus_conventions() -> None:
    assert len({series.name for series in SERIES}) == len(SERIES)
    for series in SERIES:
        assert re.fullmatch(r"pmgaft_[a-z_]+", series.name)
        assert series.help.endswith(".")
        assert series.name.endswith("_total") == (series.kind == "counter")
        assert bool(series.buckets) == (series.kind == "histogram")
        assert list(series.buckets) == sorted(series.buckets)
        if series.unit == "seconds":
            assert series.name.removesuffix("_total").endswith("_seconds")


def test_the_code_moves_exactly_the_series_of_the_table() -> None:
    package = Path(collect.__code__.co_filename).parent
    named = set()
    for file in package.glob("*.py"):
        if file.name not in ("metrics.py", "demo.py"):
            named |= set(re.findall(r'(?:count|observe|set)\(\s*"(pmgaft_\w+)"', file.read_text()))
    assert named == {series.name for series in SERIES if series.by == "worker"}


def test_the_exporter_shows_exactly_its_own_series_of_the_table() -> None:
    text = observed(ready=True, processes={"torchserve": os.getpid(), "worker 0": 2**22 + 1})
    shown = set(re.findall(r"^# TYPE (pmgaft_\w+)", text, re.MULTILINE))
    assert shown == {series.name for series in SERIES if series.by == "exporter"}
    assert total(text, "pmgaft_ready") == 1
    assert total(text, "pmgaft_build_info", version=__version__) == 1
    assert total(text, "pmgaft_process_resident_bytes", process="torchserve") > 10 * 2**20
    assert total(text, "pmgaft_process_cpu_seconds_total", process="torchserve") > 0
    assert "worker 0" not in text


def test_a_first_failure_is_a_step_from_zero() -> None:
    metrics = Metrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("pmgaft_requests_total", outcome="failed", code="internal") == 0
    assert value("pmgaft_requests_total", outcome="ok", code="internal") is None
    for code in STATUS:
        assert value("pmgaft_requests_total", outcome=outcome_of(code), code=code) == 0
    metrics.count("pmgaft_requests_total", outcome="failed", code="internal")
    assert value("pmgaft_requests_total", outcome="failed", code="internal") == 1
    assert value("pmgaft_probe_seconds_count", verdict="broken") == 0
    assert value("pmgaft_probe_seconds_count", verdict="nonsense") is None


def test_every_label_has_a_closed_list_of_values_or_says_what_is_installed() -> None:
    open_labels = {label for series in SERIES for label, values in series.labels.items() if values is None}
    assert open_labels == {
        *("name", "bundle", "engine", "format", "version", "torch", "onnxruntime", "torchserve"),  # what is served
        "process",  # as many as there are workers
        "eps",  # of sampled probes: as many as the operator names
    }
    refused = next(series for series in SERIES if series.name == "pmgaft_rejected_total").labels["reason"]
    assert refused is not None
    assert set(refused) <= set(STATUS)


def test_any_eps_is_one_of_six_label_values() -> None:
    values = {eps_label(step / 255 / 16) for step in range(255 * 16)}
    assert values == {"0.5/255", "1/255", "2/255", "4/255", "8/255", "inf"}
    assert eps_label(1 / 255) == "1/255"
    assert eps_label(1.01 / 255) == "2/255"


def test_an_unknown_series_or_label_is_a_mistake_in_the_code() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.count("pmgaft_cats_total")
    with pytest.raises(ValueError, match="label"):
        metrics.count("pmgaft_requests_total", outcome="ok", cat="tabby")


def pages_of(directory: Path, torchserve: str = "", *, ready: bool = True) -> Pages:
    return Pages(directory=directory, torchserve=lambda: torchserve, ready=lambda: ready, alive=lambda: True)


def test_one_scrape_gives_our_series_and_torchserves(tmp_path: Path) -> None:
    end(start_worker(tmp_path, 2))
    exporter = Exporter("127.0.0.1", 0, pages_of(tmp_path, "ts_inference_requests_total 4.0\n"))
    answer = httpx.get(f"http://127.0.0.1:{exporter.port}/metrics", trust_env=False)
    exporter.close()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert total(answer.text, "pmgaft_requests_total") == 2
    assert "ts_inference_requests_total 4.0" in answer.text


def test_a_scraper_that_hangs_up_leaves_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = pages_of(tmp_path)
    began, hung_up = Event(), Event()

    def slow() -> bool:
        began.set()
        return hung_up.wait(10)

    exporter = Exporter("127.0.0.1", 0, replace(pages, ready=slow, documents={"/large": "x" * 10**7}))
    with socket.create_connection(("127.0.0.1", exporter.port)) as client:
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert began.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not an orderly end
    with socket.create_connection(("127.0.0.1", exporter.port)) as client:
        client.sendall(b"GET /large HTTP/1.0\r\n\r\n")
        client.recv(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hung_up.set()
    assert httpx.get(f"http://127.0.0.1:{exporter.port}/healthz", trust_env=False).is_success
    exporter.close()
    assert "Traceback" not in capsys.readouterr().err


def test_readiness_and_liveness_are_two_questions(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, "", ready=False)
    assert pages.page("/healthz")[0] == 200
    assert pages.page("/readyz")[0] == 503
    assert pages.page("/etc/passwd")[0] == 404
