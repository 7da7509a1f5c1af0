"""A real TorchServe with a real bundle of a tiny model, over real HTTP. Two servers run at once, on any free ports.

The first is used by nearly all tests and is started with traps on its PYTHONPATH: a worker that imports a training
library leaves a mark. The second is the `pmgaft serve` command in a process of its own.
"""

import base64
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pmgaft.clip.loading import Clip
from pmgaft_export.build import export_bundle
from pmgaft_serve.client import Client, Question
from pmgaft_serve.metrics import total
from pmgaft_serve.protocol import PATH, Answer, Answers
from pmgaft_serve.torchserve import ServeOptions, Server, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

HERE = Path(__file__).parent
REQUESTS = runpy.run_path(str(HERE / "hostile" / "requests.py"))
IMAGES = runpy.run_path(str(HERE / "hostile" / "images.py"))["CASES"]
PNG: bytes = REQUESTS["PNG"]
LABELS = ["red disc", "green square", "blue stripes"]
TRAPS = ("open_clip", "timm", "torchvision", "huggingface_hub")


@dataclass(frozen=True)
class Running:
    server: Server
    http: httpx.Client
    traps: Path

    def ask(self, **fields: Any) -> httpx.Response:
        content = {"image": base64.b64encode(PNG).decode(), "labels": LABELS} | fields
        return self.http.post(self.server.url + PATH, json=content)

    def metrics(self) -> str:
        return self.http.get(self.server.metrics_url + "/metrics").text

    def total(self, name: str, /, **labels: str) -> float:
        return total(self.metrics(), name, **labels)


@pytest.fixture(scope="module")
def bundle(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(tiny_clip, tmp_path_factory.mktemp("e2e") / "bundle").directory


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    traps = tmp_path_factory.mktemp("traps")
    for name in TRAPS:
        (traps / f"{name}.py").write_text(f"open({str(traps / 'sprung')!r}, 'a').write({name!r})\nraise ImportError\n")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(traps))
        options = ServeOptions(bundle=bundle, port=0, start_seconds=400)
        with serving(options) as server, httpx.Client(trust_env=False, timeout=60) as http:
            yield Running(server, http, traps)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_a_ready_server_says_so_and_has_made_a_prediction(running: Running) -> None:
    assert running.http.get(running.server.metrics_url + "/readyz").status_code == 200
    assert running.http.get(running.server.metrics_url + "/healthz").status_code == 200
    assert running.total("pmgaft_requests_total", outcome="ok") >= 1
    assert running.server.engine == "onnxruntime-cpu"


def test_json_and_a_form_get_the_same_answer(running: Running) -> None:
    by_json = running.ask(top_k=2)
    assert by_json.headers["content-type"] == "application/json"
    answer = Answer.model_validate_json(by_json.content)
    assert len(answer.predictions) == 2
    assert answer.request_id == by_json.headers["x-request-id"]
    with Client(running.server.url) as client:
        by_form = client.classify(PNG, Question(labels=LABELS, top_k=2))
    assert by_form.predictions == answer.predictions


def test_several_images_come_back_in_order_with_their_own_errors(running: Running) -> None:
    files = {"image.0": PNG, "image.1": b"no image", "image.2": PNG}
    answer = running.http.post(running.server.url + PATH, files=files, data={"labels": "cat,dog"})
    results = Answers.model_validate_json(answer.content).results
    assert [result.error.code if result.error else None for result in results] == [None, "image_invalid", None]


def test_labels_of_any_script_come_back_as_they_were_sent(running: Running) -> None:
    labels = ["Katze", "猫", "gato ñandú", "🐈", "{}"]
    answer = running.ask(labels=labels).json()
    assert sorted(prediction["label"] for prediction in answer["predictions"]) == sorted(labels)
    with Client(running.server.url) as client:
        assert len(client.classify(PNG, Question(labels=labels)).predictions) == 5


def test_a_label_beyond_the_models_context_is_refused_and_not_cut(running: Running) -> None:
    answer = running.ask(labels=["cat", "one two three four five six seven eight nine ten eleven twelve thirteen"])
    assert (answer.status_code, code(answer)) == (422, "label_too_long")


def test_a_probe_is_answered_with_its_threat_model(running: Running) -> None:
    probe = Answer.model_validate_json(running.ask(probe={"eps": "64/255", "steps": 5}).content).probe
    assert probe is not None
    assert probe.verdict in ("broken", "not_broken")
    assert probe.threat_model["eps"] == "64/255"
    assert running.total("pmgaft_probes_total", eps="inf") >= 1


def test_whatever_is_sent_gets_its_answer_and_nothing_dies(running: Running) -> None:
    workers = running.server.workers()
    for name, (content_type, fields, status, expected) in REQUESTS["CASES"].items():
        if content_type.startswith("multipart"):
            files = {field: value for field, value in fields.items() if field.startswith("image")}
            data = {field: value for field, value in fields.items() if field not in files}
            answer = running.http.post(running.server.url + PATH, files=files or {"": b""}, data=data)
        else:
            headers = {"Content-Type": content_type} if content_type else {}
            answer = running.http.post(running.server.url + PATH, content=fields.get("body", b"x=y"), headers=headers)
        if name == "a form without image":
            continue  # without a file, httpx sends no multipart form
        assert (name, answer.status_code, code(answer)) == (name, status, expected)
    for name, (data, status, expected) in IMAGES.items():
        answer = running.http.post(running.server.url + PATH, files={"image": data}, data={"labels": "cat,dog"})
        assert (name, answer.status_code) == (name, status)
        assert status == 200 or code(answer) == expected
    assert running.ask().status_code == 200
    assert running.server.workers() == workers
    assert "Traceback" not in running.server.log.read_text()


def test_a_request_over_our_limit_gets_our_413_with_json(running: Running) -> None:
    answer = running.ask(image="A" * (33 * 2**20))
    assert (answer.status_code, code(answer)) == (413, "request_too_large")


def test_other_methods_and_paths_do_no_harm(running: Running) -> None:
    assert running.http.get(running.server.url + PATH).status_code == 400
    assert running.http.post(running.server.url + "/predictions/other", content=b"x").status_code == 404
    assert running.http.post(running.server.url + "/models?url=http://127.0.0.1/x.mar").status_code in (404, 405)
    assert running.ask().status_code == 200


def test_unlike_requests_at_once_each_get_their_own_answer(running: Running) -> None:
    questions = [{"labels": LABELS[: 1 + number % 3], "top_k": 1 + number % 2} for number in range(24)]
    alone = [running.ask(**question).json()["predictions"] for question in questions[:6]]
    before = running.total("pmgaft_batch_images_count")
    with ThreadPoolExecutor(24) as threads:
        together = [answer.json() for answer in threads.map(lambda question: running.ask(**question), questions)]
    for number, answer in enumerate(together):
        assert [p["label"] for p in answer["predictions"]] == [p["label"] for p in alone[number % 6]]
    assert running.total("pmgaft_batch_images_count") - before <= 24


def test_plain_requests_pass_probes_and_a_killed_worker_is_replaced(running: Running) -> None:
    """One scene, because a new worker takes a while: three long probes, and then the worker is killed under them."""
    long = {"eps": "1e-9", "steps": 200, "restarts": 10}
    with ThreadPoolExecutor(3) as threads:
        probes = [threads.submit(running.ask, probe=long) for _ in range(3)]
        wait_for(lambda: running.total("pmgaft_in_flight_requests") == 3)
        assert running.ask().status_code == 200
        refused = running.ask(probe="1/255")
        assert (refused.status_code, code(refused)) == (429, "probe_busy")
        assert int(refused.headers["retry-after"]) > 0
        assert not any(probe.done() for probe in probes)
        before = running.total("pmgaft_requests_total", outcome="ok")
        starts = running.total("pmgaft_worker_starts_total")
        os.kill(running.server.workers()[0], signal.SIGKILL)
        assert {probe.result().status_code for probe in probes} <= {500, 507}  # answered, and not left waiting
    assert running.ask().status_code == 200  # waited for the next worker
    wait_for(running.server.ready)
    assert running.total("pmgaft_requests_total", outcome="ok") == before + 1
    assert running.total("pmgaft_worker_starts_total") == starts + 1
    assert running.total("pmgaft_in_flight_requests") == 0


def test_one_scrape_has_our_series_and_torchserves(running: Running) -> None:
    text = running.metrics()
    for name in ("pmgaft_stage_seconds_bucket", "pmgaft_request_seconds_sum", "pmgaft_model_info"):
        assert total(text, name) > 0
    assert total(text, "ts_inference_requests_total") > 0


def test_the_openapi_document_is_served(running: Running) -> None:
    document = running.http.get(running.server.metrics_url + "/openapi.json").json()
    assert list(document["paths"]) == [PATH]


def test_a_real_worker_imports_no_training_library(running: Running) -> None:
    running.ask(probe="1/255")
    assert not (running.traps / "sprung").exists()


def test_everything_the_server_writes_lies_in_its_own_directory(running: Running) -> None:
    assert running.server.state.stat().st_mode & 0o077 == 0
    java = psutil.Process(running.server._process.pid)
    for process in (java, *java.children(recursive=True)):
        written = [file.path for file in process.open_files() if file.mode in ("w", "a", "r+", "w+", "a+")]
        assert [path for path in written if not path.startswith(str(running.server.state))] == []


def test_only_loopback_addresses_are_listened_on(running: Running) -> None:
    java = psutil.Process(running.server._process.pid)
    for process in (java, *java.children(recursive=True)):
        for connection in process.net_connections("inet"):
            assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1", "::1")


def test_the_command_serves_beside_it_asks_for_its_token_and_drains_on_sigterm(bundle: Path, running: Running) -> None:
    command = [sys.executable, "-m", "pmgaft", "serve", str(bundle), "--port", "0", "--token", "s3cret"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        banner = [process.stdout.readline() for _ in range(5)]
        found = re.search(r"ready at (http://127\.0\.0\.1:\d+)", banner[0])
        assert found, process.communicate()[1]
        url = found[1]
        exporter = banner[1].split()[1].removesuffix("/metrics")
        log = Path(banner[2].split()[1])
        assert f"--url {url} --token TOKEN" in banner[3]
        assert url != running.server.url

        def ask(token: str, **fields: str) -> httpx.Response:
            data = {"labels": json.dumps(LABELS)} | fields
            headers = {"Authorization": f"Bearer {token}"}
            return httpx.post(url + PATH, files={"image": PNG}, data=data, headers=headers, timeout=60, trust_env=False)

        def page(path: str) -> httpx.Response:
            return httpx.get(exporter + path, trust_env=False, timeout=10)

        refused = ask("wrong")
        assert (refused.status_code, code(refused)) == (401, "token_invalid")
        assert ask("s3cret").status_code == 200
        assert running.ask().status_code == 200
        with ThreadPoolExecutor(1) as thread:
            probe = json.dumps({"eps": "1e-9", "steps": 30, "restarts": 2})
            slow = thread.submit(ask, "s3cret", probe=probe)
            wait_for(lambda: total(page("/metrics").text, "pmgaft_in_flight_requests") == 1)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: slow.done() or page("/readyz").status_code == 503)
            assert slow.result().status_code == 200
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0
        assert told.splitlines()[-1] == "stopped"
        assert not log.parent.exists()
        with pytest.raises(httpx.ConnectError):
            ask("s3cret")
    finally:
        process.kill()
        process.communicate()
    assert running.ask().status_code == 200
