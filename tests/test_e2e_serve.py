"""A real TorchServe with a real bundle of a tiny model, over real HTTP. Two servers run at once, on any free ports.

The first is used by nearly all tests and is started with traps on its PYTHONPATH: a worker that imports a training
library leaves a mark. The second is the `pmgaft serve` command in a process of its own.
"""

import base64
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running_server import LABELS, PNG, Running, wait_for

from pmgaft_serve.bench import Load, form_message, picture, rotating, run, target_of
from pmgaft_serve.client import Client, Question
from pmgaft_serve.metrics import total
from pmgaft_serve.protocol import PATH, Answer, Answers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

HERE = Path(__file__).parent
REQUESTS = runpy.run_path(str(HERE / "hostile" / "requests.py"))
IMAGES = runpy.run_path(str(HERE / "hostile" / "images.py"))["CASES"]


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


def test_a_label_set_is_there_from_the_start(running: Running) -> None:
    missed = running.total("pmgaft_label_cache_misses_total")
    answer = running.ask(labels="@pets").json()
    assert sorted(prediction["label"] for prediction in answer["predictions"]) == ["bird", "cat", "dog"]
    assert running.total("pmgaft_label_cache_misses_total") == missed


def test_a_clients_own_request_id_comes_back(running: Running) -> None:
    content = {"image": base64.b64encode(PNG).decode(), "labels": LABELS}
    url, headers = running.server.url + PATH, {"X-Request-Id": "client-7"}
    assert running.http.post(url, json=content, headers=headers).json()["request_id"] == "client-7"
    assert running.http.post(url, json=content | {"labels": []}, headers=headers).json()["request_id"] == "client-7"


def test_grpc_takes_the_same_fields_and_gives_the_same_answers(running: Running) -> None:
    """By hand, in protobuf's wire format: PredictionsRequest {1: model_name, 3: map<string, bytes> input}."""
    grpc = pytest.importorskip("grpc")

    def field(number: int, value: bytes) -> bytes:
        size, length = len(value), b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + value

    def request(**fields: bytes) -> bytes:
        entries = (field(3, field(1, name.encode()) + field(2, value)) for name, value in fields.items())
        return field(1, b"pmgaft") + b"".join(entries)

    with grpc.insecure_channel(running.server.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        predictions = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")

        def ask(**fields: bytes) -> Any:
            answer = predictions(request(**fields), timeout=60)
            return json.loads(answer[answer.index(b"{") :])  # PredictionResponse {1: prediction}

        by_form = ask(image=PNG, labels=b"red disc,green square", top_k=b"1")
        content = {"image": base64.b64encode(PNG).decode(), "labels": LABELS[:2], "top_k": 1}
        by_json = ask(body=json.dumps(content).encode())
        assert by_form["predictions"] == by_json["predictions"]
        assert by_form["predictions"] == running.ask(labels=LABELS[:2], top_k=1).json()["predictions"]
        assert ask(image=b"no image", labels=b"a,b")["error"]["code"] == "image_invalid"


def test_many_at_once_over_few_connections_are_all_answered_in_batches(running: Running) -> None:
    target = target_of(running.server.url)
    photograph = picture(300, 200)
    messages = [form_message(target, photograph, ["a", "b", str(number)], top_k="1") for number in range(20)]
    batches, images = running.total("pmgaft_batch_images_count"), running.total("pmgaft_batch_images_sum")
    report = run(Load(target=target, message=rotating(messages), concurrency=16, seconds=60.0, requests=64))
    assert report.statuses == {"200": 64}
    batches, images = (
        running.total("pmgaft_batch_images_count") - batches,
        running.total("pmgaft_batch_images_sum") - images,
    )
    assert images > batches  # some shared a call of the encoder


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
    assert probe.threat_model.eps == "64/255"
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
        assert (name, answer.status_code) == (name, status)
        assert (name, code(answer)) == (name, expected)
    for name, (data, status, expected) in IMAGES.items():
        answer = running.http.post(running.server.url + PATH, files={"image": data}, data={"labels": "cat,dog"})
        assert (name, answer.status_code) == (name, status)
        assert status == 200 or code(answer) == expected
    assert running.ask().status_code == 200
    assert running.server.workers() == workers
    assert "Traceback" not in running.server.log.read_text()


@pytest.mark.parametrize("mebibytes", [17, 40])  # the second is also over TorchServe's limit
def test_a_request_over_our_limit_gets_our_413_with_json(running: Running, mebibytes: int) -> None:
    answer = running.ask(image="A" * (mebibytes * 2**20))
    assert (answer.status_code, code(answer)) == (413, "request_too_large")
    assert "at most 16,777,216 " in answer.text
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


def test_few_new_labels_pass_the_thousands_of_others(running: Running) -> None:
    """Eight clients ask for 2,000 new texts each; who comes after them with two is answered before any of them."""
    templates = ["a {}", "the {}"]

    def thousands(client: int) -> httpx.Response:
        return running.ask(labels=[f"{client} {number}" for number in range(1000)], templates=templates, top_k=1)

    encoded = running.total("pmgaft_texts_encoded_total")
    with ThreadPoolExecutor(8) as threads:
        lists = [threads.submit(thousands, client) for client in range(8)]
        wait_for(lambda: running.total("pmgaft_texts_encoded_total") > encoded)
        assert running.ask(labels=["few", "new"]).status_code == 200
        assert not any(one.done() for one in lists)
        assert {one.result().status_code for one in lists} == {200}


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


class Command:
    """`pmgaft serve` in a process of its own: two workers, a token, one JSON line a request."""

    def __init__(self, bundle: Path) -> None:
        options = ("--port", "0", "--token", "s3cret", "--workers", "2", "--log-format", "json")
        command = [sys.executable, "-m", "pmgaft", "serve", str(bundle), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self.told = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_for(lambda: self._ready() is not None or self.process.poll() is not None, 400)
        ready = self._ready()
        assert ready is not None, self.end()
        self.ready = ready

    def _ready(self) -> dict[str, Any] | None:
        return next((line for line in self.lines if line["event"] == "ready"), None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(json.loads(line) for line in self.process.stdout)

    def ask(self, token: str = "s3cret", request_id: str = "", **fields: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}", "X-Request-Id": request_id}
        data = {"labels": json.dumps(LABELS)} | fields
        url = self.ready["url"] + PATH
        return httpx.post(url, files={"image": PNG}, data=data, headers=headers, timeout=60, trust_env=False)

    def page(self, path: str) -> httpx.Response:
        return httpx.get(self.ready["metrics"] + path, trust_env=False, timeout=10)

    def end(self) -> str:
        """What it said on stderr, once it has ended."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self.told = self.process.stderr.read()
        self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        self.process.stdout.close()
        self.process.stderr.close()
        return self.told


def test_the_command_serves_beside_it_with_two_workers_and_loses_nothing_when_it_is_stopped_under_load(
    served_bundle: Path, running: Running
) -> None:
    command = Command(served_bundle)
    try:
        assert command.ready["url"] != running.server.url
        assert command.page("/readyz").status_code == 200
        refused = command.ask("wrong", "id-wrong")
        assert (refused.status_code, code(refused)) == (401, "token_invalid")
        assert running.ask().status_code == 200

        answered: dict[str, int | None] = {}
        stopped = threading.Event()

        def client(name: int) -> None:
            """Asks until the server is gone; None is a request that got no answer."""
            for number in range(100_000):
                request_id = f"{name}-{number}"
                try:
                    answered[request_id] = command.ask(request_id=request_id).status_code
                except httpx.HTTPError:
                    answered[request_id] = None
                    if stopped.is_set():
                        return

        with ThreadPoolExecutor(7) as threads:
            clients = [threads.submit(client, name) for name in range(6)]
            probe = json.dumps({"eps": "1e-9", "steps": 30, "restarts": 2})
            wait_for(lambda: len(answered) > 40)
            slow = threads.submit(command.ask, request_id="slow", probe=probe)
            wait_for(lambda: slow.done() or total(command.page("/metrics").text, "pmgaft_in_flight_requests") > 0)
            command.process.send_signal(signal.SIGTERM)
            told = command.end()
            stopped.set()
            assert slow.result().status_code in (200, 503)  # 503 if it came when the server was already stopping
            for one in clients:
                one.result()
    finally:
        command.process.kill()
        command.end()
    assert command.process.returncode == 0
    assert told.splitlines()[-1] == "stopped"
    assert not Path(command.ready["log"]).parent.exists()
    assert set(answered.values()) <= {200, 503, None}
    requests = [line for line in command.lines if line["event"] == "request"]
    done = {line["id"] for line in requests if line["status"] == 200} & set(answered)
    assert len(done) > 20
    assert [name for name in done if answered[name] != 200] == []  # whatever a worker finished, its client got
    assert len({line["worker"] for line in requests}) == 2
    assert {"id-wrong"} <= {line["id"] for line in requests if line["status"] == 401}
    assert not any("blue" in json.dumps(line) for line in requests)
    assert running.ask().status_code == 200
