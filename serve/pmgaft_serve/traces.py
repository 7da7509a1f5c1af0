"""One OpenTelemetry span a request, the child of the client's `traceparent`, with the log line's figures.

On where the environment says where spans go, as OpenTelemetry has it: OTEL_EXPORTER_OTLP_ENDPOINT, or that of traces
alone. The packages come with the extra "traces"; spans are sent from a thread, in batches, and dropped where nobody
takes them, so that no request waits for a collector.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pmgaft import __version__
from pmgaft.errors import InputError

from .protocol import PATH
from .service import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracing(environment: Mapping[str, str] = os.environ) -> Callable[[Record], None] | None:
    """What notes an answer as a span; None where no endpoint is named.

    Raises: InputError (traces_missing) where one is and the packages are not installed.
    """
    if not any(environment.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        message = f'{" or ".join(ENDPOINTS)} is set, and spans need: pip install "pmgaft[traces]"'
        raise InputError(message, code="traces_missing") from None
    named = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "pmgaft"}
    provider = TracerProvider(resource=Resource.create({**named, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return span_writer(provider)


def span_writer(provider: TracerProvider) -> Callable[[Record], None]:
    """Each answer as a span of this provider's, ending now."""
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer, propagator = provider.get_tracer("pmgaft_serve", __version__), TraceContextTextMapPropagator()

    def write(record: Record) -> None:
        end = time.time_ns()
        span = tracer.start_span(
            f"POST {PATH}",
            context=propagator.extract({"traceparent": record.traceparent}),
            kind=SpanKind.SERVER,
            start_time=end - round(1e6 * record.milliseconds["total"]),
            attributes={
                "http.request.method": "POST",
                "http.response.status_code": record.status,
                "pmgaft.request_id": record.id,
                "pmgaft.outcome": record.outcome,
                "pmgaft.code": record.code,
                "pmgaft.images": record.images,
                "pmgaft.labels": record.labels,
                "pmgaft.templates": record.templates,
                "pmgaft.probe": record.probe,
                **{f"pmgaft.ms.{stage}": value for stage, value in record.milliseconds.items()},
            },
        )
        if record.status >= 500:
            span.set_status(StatusCode.ERROR, record.code)
        span.end(end)

    return write
