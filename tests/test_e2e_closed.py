"""What a real server keeps closed unless asked: addresses, other people's pages, plain HTTP where there is TLS."""

import base64
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from running_server import LABELS, PICKLE_TRAP, PNG, Running

from pmgaft.errors import ServerError
from pmgaft_serve.client import Client, Question
from pmgaft_serve.credentials import Tls
from pmgaft_serve.protocol import PATH
from pmgaft_serve.torchserve import ServeOptions, Server, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.xdist_group("serve")]

ORIGIN = "https://lab.example"


def listening(*processes: psutil.Process) -> set[int]:
    """Every port that these listen on; whatever they have open is on the loopback interface."""
    sockets = [one for process in processes for one in process.net_connections("inet")]
    assert {one.laddr.ip.removeprefix("::ffff:") for one in sockets} <= {"127.0.0.1", "::1"}
    return {one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN}


def test_a_server_listens_on_loopback_alone_and_on_no_port_that_is_not_told(running: Running) -> None:
    server = running.server
    told = {int(url.rpartition(":")[2]) for url in (server.url, server.metrics_url, server.grpc)}
    java, mine = psutil.Process(server.processes()["torchserve"]), listening(psutil.Process())
    theirs = listening(java, *java.children(recursive=True))
    assert told <= theirs | mine
    assert len(theirs - told) == 1  # TorchServe cannot close its gRPC port for management, whose API is off


def test_management_and_metrics_are_files_that_only_their_user_reaches(running: Running) -> None:
    state = running.server.state
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert state.stat().st_uid == os.getuid()
    assert stat.S_ISSOCK((state / "management.sock").stat().st_mode)
    assert "ts_inference_requests_total" in running.metrics()


def test_no_model_can_be_loaded_even_over_the_management_socket(running: Running) -> None:
    transport = httpx.HTTPTransport(uds=str(running.server.state / "management.sock"))
    with httpx.Client(base_url="http://torchserve", transport=transport) as client:
        assert client.post("/models", params={"url": "https://example.com/evil.mar"}).status_code == 405
        assert client.delete("/models/pmgaft").status_code == 405


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ping", 200),
        ("GET", PATH, 405),
        ("PUT", PATH, 405),
        ("POST", f"{PATH}/1.0", 404),
        ("POST", "/predictions/other", 404),
        ("POST", "/explanations/pmgaft", 404),
        ("POST", "/invocations", 404),
        ("POST", "/v1/models/pmgaft:predict", 404),
        ("POST", "/v2/models/pmgaft/infer", 404),
        ("POST", "/wfpredict/pmgaft", 404),
        ("GET", "/models/pmgaft", 404),
        ("GET", "/metrics", 404),
        ("OPTIONS", "/", 404),
    ],
)
def test_torchserve_answers_strangers_at_no_other_address_and_to_no_other_method(
    running: Running, method: str, path: str, status: int
) -> None:
    content = {"image": base64.b64encode(PNG).decode(), "labels": LABELS}
    assert running.http.request(method, running.server.url + path, json=content).status_code == status


def test_no_page_of_another_origin_reads_an_answer(running: Running) -> None:
    content = {"image": base64.b64encode(PNG).decode(), "labels": LABELS}
    answer = running.http.post(running.server.url + PATH, json=content, headers={"Origin": ORIGIN})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_nothing_is_unpickled_from_the_start_to_an_answer_and_a_probe(running: Running) -> None:
    assert running.ask().status_code == 200
    assert running.ask(probe={"eps": "1/255", "steps": 2}).status_code == 200
    sprung = running.traps / "sprung"
    assert not sprung.exists(), sprung.read_text()


def test_the_trap_for_unpickling_springs(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / "sitecustomize.py").write_text(PICKLE_TRAP.format(sprung=str(sprung)))
    program = "import pickle, pathlib; pickle.loads(pickle.dumps(pathlib.Path('x')))"
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
    assert "PosixPath" in sprung.read_text()


def test_no_served_file_names_pickle_or_torch_load() -> None:
    top = Path(__file__).parent.parent
    served = [
        *(top / "serve").rglob("*.py"),
        *(top / "export").rglob("*.py"),
        *(top / "pmgaft" / "probe").rglob("*.py"),
    ]
    assert served
    assert not [path for path in served if re.search(r"pickle\.|import pickle|torch\.load\b", path.read_text())]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    files = tmp_path_factory.mktemp("tls")
    certificate, key = files / "certificate.pem", files / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(words, check=True, capture_output=True)
    return Tls(certificate=certificate, key=key)


@pytest.fixture(scope="module")
def secured(served_bundle: Path, tls: Tls) -> Iterator[Server]:
    options = ServeOptions(bundle=served_bundle, port=0, start_seconds=400, tls=tls, cors_origin=ORIGIN)
    with serving(options) as server:
        yield server


def test_tls_answers_who_trusts_its_certificate(secured: Server, tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert secured.url.startswith("https://")
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    with Client(secured.url) as client:
        assert client.classify(PNG, Question(labels=LABELS)).predictions
    monkeypatch.delenv("SSL_CERT_FILE")
    with Client(secured.url) as client, pytest.raises(ServerError, match=r"not trusted.*SSL_CERT_FILE"):
        client.classify(PNG, Question(labels=LABELS))


def test_plain_http_gets_nothing_from_a_server_with_tls(secured: Server) -> None:
    host, _, port = secured.url.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        plain.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b"HTTP/1.1 200" not in plain.recv(1000)


def test_only_the_named_origins_pages_read_answers(secured: Server) -> None:
    content = {"image": base64.b64encode(PNG).decode(), "labels": LABELS}
    with httpx.Client(verify=False, timeout=60, trust_env=False) as client:
        answer = client.post(secured.url + PATH, json=content, headers={"Origin": ORIGIN})
        asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
        before = client.options(secured.url + PATH, headers=asked)
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert before.is_success
    assert before.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in before.headers["access-control-allow-methods"]
