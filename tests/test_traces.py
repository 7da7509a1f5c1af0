"""Spans: one a request, under the client's, with the log line's figures; sent over OTLP where the environment says."""

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from test_request_log import RECORD

from pmgaft.errors import InputError
from pmgaft_serve.traces import span_writer, tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans_of(*records: object) -> tuple[object, ...]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    write = span_writer(provider)
    for record in records:
        write(record)  # type: ignore[arg-type]
    return exporter.get_finished_spans()


def test_a_span_is_the_child_of_the_clients_and_as_long_as_the_request() -> None:
    (span,) = spans_of(replace(RECORD, traceparent=f"00-{TRACE}-{SPAN}-01"))
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == SPAN
    assert (span.end_time - span.start_time) / 1e6 == pytest.approx(RECORD.milliseconds["total"])
    assert span.attributes["pmgaft.request_id"] == RECORD.id
    assert span.attributes["http.response.status_code"] == RECORD.status
    assert span.attributes["pmgaft.ms.decode"] == RECORD.milliseconds["decode"]


@pytest.mark.parametrize("sent", ["", "nonsense", f"00-{TRACE}-{SPAN}", "00-" + 32 * "0" + f"-{SPAN}-01"])
def test_what_is_no_traceparent_begins_a_trace(sent: str) -> None:
    (span,) = spans_of(replace(RECORD, traceparent=sent))
    assert span.parent is None


def test_only_our_own_mistakes_are_errors() -> None:
    refused, failed = spans_of(replace(RECORD, status=422), replace(RECORD, status=500, code="internal"))
    assert refused.status.status_code == StatusCode.UNSET
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "internal")


def test_tracing_is_off_unless_an_endpoint_is_named_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing({}) is None
    assert tracing({"OTEL_SERVICE_NAME": "x"}) is None
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match=r"pip install .pmgaft\[traces\]"):
        tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})


def test_spans_reach_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []
    came = threading.Event()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            came.set()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        write = tracing()
        assert write is not None
        write(replace(RECORD, id="the-one"))
        assert came.wait(30)
        server.shutdown()
        thread.join()
    path, body = received[0]
    assert path == "/v1/traces"
    assert b"the-one" in body
    assert b"pmgaft" in body
