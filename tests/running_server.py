"""One real TorchServe with a real bundle of a tiny model, for all tests that put questions to a server.

It is started with traps on its PYTHONPATH: a worker that imports a training library, or unpickles a class or a
function (Python's audit event for it), leaves a mark. Tests that use it
belong to the xdist group "serve", so that one process holds it.
"""

import base64
import os
import runpy
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from pmgaft.clip.loading import Clip
from pmgaft_export.build import export_bundle
from pmgaft_serve.label_sets import LabelSet
from pmgaft_serve.metrics import total
from pmgaft_serve.probing import ProbePolicy
from pmgaft_serve.protocol import PATH
from pmgaft_serve.service import Settings
from pmgaft_serve.torchserve import ServeOptions, Server, serving

PNG: bytes = runpy.run_path(str(Path(__file__).parent / "hostile" / "requests.py"))["PNG"]
LABELS = ["red disc", "green square", "blue stripes"]
TRAPS = ("open_clip", "timm", "torchvision", "huggingface_hub")
PICKLE_TRAP = """
import sys
def watch(event, arguments):
    if event == "pickle.find_class":
        with open({sprung!r}, "a") as file:
            file.write(f"unpickled {{arguments}}\\n")
sys.addaudithook(watch)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def connect(url: str) -> socket.socket:
    """A connection to the server at `url`, for bytes that no client library would send."""
    where = urlsplit(url)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=60)


def read_to_the_end(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer


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


@pytest.fixture(scope="session")
def served_bundle(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(tiny_clip, tmp_path_factory.mktemp("e2e") / "bundle").directory


@pytest.fixture(scope="session")
def running(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    traps = tmp_path_factory.mktemp("traps")
    for name in TRAPS:
        (traps / f"{name}.py").write_text(f"open({str(traps / 'sprung')!r}, 'a').write({name!r})\nraise ImportError\n")
    (traps / "sitecustomize.py").write_text(PICKLE_TRAP.format(sprung=str(traps / "sprung")))
    pets = LabelSet(name="pets", labels=("cat", "dog", "bird"))
    settings = Settings(probe=ProbePolicy(queue=3))
    options = ServeOptions(bundle=served_bundle, port=0, start_seconds=400, sets=(pets,), settings=settings)
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:  # of the server alone
            environment.setenv("PYTHONPATH", str(traps), prepend=os.pathsep)
            server = stack.enter_context(serving(options))
        yield Running(server, stack.enter_context(httpx.Client(trust_env=False, timeout=300)), traps)
