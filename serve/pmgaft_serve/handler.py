"""TorchServe's shapes in, ours out. TorchServe loads this module by name, makes its one class, and calls `handle`.

Asynchronous mode: `handle` gets one request at a time, and many are under way on one event loop.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ts.context import Context

from . import worker_loop
from .processes import alive
from .watchdog import beat, pulse_file

if TYPE_CHECKING:
    from .service import Incoming, Record, Service

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # visible ASCII: it goes into logs and answers


class Handler:
    """One worker's service behind TorchServe's interface."""

    def initialize(self, context: Context) -> None:
        """Load the model and try it. Where that fails, the reason is left in a file for the launcher."""
        config: Mapping[str, Any] = context.model_yaml_config["pmgaft"]
        pulse = pulse_file(Path(config["state"]), os.getpid())
        worker_loop.install(lambda: beat(pulse))
        _log_to_stderr()
        _end_with(config["launcher"])
        try:
            self._service = _service(config, context.system_properties["gpu_id"])
        except Exception as error:
            Path(config["state"], "failure.txt").write_text(_reason(error), encoding="utf-8")
            raise

    async def handle(self, data: list[dict[str, bytes]], context: Context) -> list[bytes]:
        """Answer the one request in `data`."""
        reply = await self._service.answer(incoming(data[0], context))
        context.set_response_status(reply.status, HTTPStatus(reply.status).phrase, 0)
        context.set_response_content_type(0, "application/json")
        for name, value in reply.headers.items():
            context.set_response_header(0, name, value)
        return [reply.body]


def incoming(fields: Mapping[str, bytes], context: Context) -> Incoming:
    """One request as the service takes it.

    Its id is the client's X-Request-Id where that is visible ASCII, else TorchServe's. What comes by gRPC has no
    headers: there, `authorization` and `x-request-id` are entries of the input map, beside the form's fields.
    """
    from .service import Incoming

    headers: dict[str, str] = {name.lower(): value for name, value in context.get_all_request_header(0).items()}
    if not headers:
        headers = {name: fields[name].decode("latin-1") for name in ("authorization", "x-request-id") if name in fields}
        fields = {name: value for name, value in fields.items() if name not in headers}
    asked = headers.get("x-request-id", "")
    return Incoming(
        fields=fields,
        content_type=headers.get("content-type"),
        authorization=headers.get("authorization"),
        traceparent=headers.get("traceparent", ""),
        request_id=asked if _REQUEST_ID.fullmatch(asked) else context.get_request_id(0) or "",
    )


def _service(config: Mapping[str, Any], gpu_id: int | None) -> Service:
    import torch
    from pydantic import TypeAdapter

    from pmgaft_export.bundle import open_bundle

    from .engines import worker_device
    from .label_sets import load_label_sets
    from .metrics import Metrics
    from .model import model_of
    from .service import Service, Settings

    # Of this thread, the event loop's: its sums are too small to share. Before anything else, since threads that were
    # once started for it count for good: with more of them than cores OpenMP no longer spins, and a probe takes twice
    # the time.
    torch.set_num_threads(1)
    settings = TypeAdapter(Settings).validate_python(config["settings"])
    device = worker_device(config["device"], gpu_id)
    model = model_of(open_bundle(Path(config["bundle"])), config["engine"], device, settings.threads)
    metrics = Metrics()
    state = Path(config["state"])
    service = Service(
        model,
        settings,
        metrics,
        draining=(state / "draining").exists,
        on_answered=_noting(state, config["log"]),
        sets=load_label_sets(state / "label-sets.json"),
        warm=load_label_sets(state / "warm-labels.json"),
    )
    service.warm_up()
    gc.collect()
    gc.freeze()  # what is there now stays: to look through it again would stop every request for a tenth of a second
    metrics.count("pmgaft_worker_starts_total")
    return service


def _noting(state: Path, form: Any) -> Callable[[Record], None]:
    """Where each answer is noted: the log, to which warnings and errors go too, beside TorchServe's; and a trace."""
    from .request_log import SOCKET, Lines, request_line
    from .traces import tracing

    trace = tracing()
    lines = None if form == "none" else Lines(state / SOCKET, form)
    if lines is not None:
        logging.getLogger("pmgaft_serve").addHandler(lines.logging_handler())

    def note(record: Record) -> None:
        if lines is not None:
            lines.write(request_line(record, form))
        if trace is not None:
            trace(record)

    return note


def _reason(error: Exception) -> str:
    from pmgaft.errors import PmgaftError

    return error.message if isinstance(error, PmgaftError) else f"{type(error).__name__}: {error}"


def _log_to_stderr() -> None:
    """TorchServe's log keeps what a worker writes to stderr; its own lines at every request are not worth keeping."""
    logging.getLogger().setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    ours = logging.getLogger("pmgaft_serve")
    ours.addHandler(handler)
    ours.propagate = False


def _end_with(launcher: int) -> None:
    """Where the launcher or TorchServe was killed, end TorchServe and this worker: they would hold port and memory."""
    torchserve = os.getppid()

    def watch() -> None:
        while os.getppid() == torchserve and alive(launcher):
            time.sleep(1)
        if os.getppid() == torchserve:
            os.kill(torchserve, signal.SIGTERM)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parents", daemon=True).start()
