"""The pages that are made from code: docs/metrics.md and docs/openapi.json.

`python -m pmgaft_serve.documents docs` writes them (`make docs`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from .metrics import SERIES, Series
from .protocol import openapi

_METRICS_HEAD = """# Metrics

Made from the table in `serve/pmgaft_serve/metrics.py` by `make docs`; do not edit.

`http://HOST:METRICS_PORT/metrics` holds these series, added up over all workers, dead ones included, and TorchServe's
own (`ts_...`). Counters and histograms are there from the start, at 0 for each label value. No label value is anything
that a client sent. Boards and alerts made of them: [deploy.md](deploy.md).

| series | type | unit | labels | meaning |
|---|---|---|---|---|
"""

_LABELS_HEAD = """
## Label values

`code` of `pmgaft_requests_total` is `ok` or one of the error codes in [openapi.json](openapi.json). `eps` of
`pmgaft_sampled_probes_total` is one of those that the server was told to tell apart. `process` is `torchserve`, or
`worker 0`, `worker 1`, ... The labels of the two `_info` series say what is installed and served. All others:

| series | label | values |
|---|---|---|
"""

_BUCKETS_HEAD = """
## Buckets

| histogram | upper bounds |
|---|---|
"""


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = "".join(f"| {' | '.join(_row(series))} |\n" for series in SERIES)
    values = "".join(
        f"| `{series.name}` | `{label}` | {_code(known)} |\n"
        for series in SERIES
        for label, known in series.labels.items()
        if known is not None and label != "code"
    )
    buckets = "".join(f"| `{series.name}` | {_bounds(series)} |\n" for series in SERIES if series.buckets)
    return _METRICS_HEAD + rows + _LABELS_HEAD + values + _BUCKETS_HEAD + buckets


def openapi_document() -> str:
    """docs/openapi.json."""
    return json.dumps(openapi(), indent=1, ensure_ascii=False) + "\n"


def write(directory: Path) -> None:
    """Write every page into `directory`."""
    for name, text in {"metrics.md": metrics_page(), "openapi.json": openapi_document()}.items():
        (directory / name).write_text(text, encoding="utf-8")


def _row(series: Series) -> tuple[str, ...]:
    return f"`{series.name}`", series.kind, series.unit, _code(series.labels), series.help


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _bounds(series: Series) -> str:
    if series.unit.startswith("pixel range"):
        return ", ".join(f"{bound * 255:g}/255" if bound < 0.25 else f"{bound:g}" for bound in series.buckets)
    return ", ".join(f"{bound:g}" for bound in series.buckets)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
