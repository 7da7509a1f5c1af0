"""The folder that a probe of many pictures leaves: tables, drawings, and the page that shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from pmgaft.errors import InputError
from pmgaft.probe.charts import curve, histogram
from pmgaft.probe.folder import Row
from pmgaft.probe.full import Finding, Question
from pmgaft.probe.page import Drawing, page
from pmgaft.probe.picture import alternative, draw
from pmgaft.probe.summary import summarise
from pmgaft.probe.tables import to_csv, to_json, to_junit

FILES = {
    "index.html": "the page; it needs nothing but what lies beside it",
    "images.csv": "a line a picture",
    "report.json": "summary, and every picture's whole report",
    "junit.xml": "a test case a picture",
    "curve.svg": "the share of answers that stand, and accuracy, against eps",
    "histogram.svg": "how the smallest eps are spread",
    "pictures/": "each picture clean, adversarial, what was changed, and the answers with bars",
}


class Report:
    """Filled row by row, so that what is there can be written whenever the run ends."""

    def __init__(self, folder: Path, question: Question) -> None:
        """Raises: InputError for a folder that holds something already: an older report's pictures would mix with
        ours; OSError where it cannot be made.
        """
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; name another --output, or empty it", field="output")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.question = folder, question
        self.rows: list[Row] = []
        self._drawings: dict[str, Drawing] = {}

    def add(self, row: Row, finding: Finding | None) -> None:
        """Draw what was found, and keep the row."""
        if finding is not None:
            name = f"pictures/{len(self.rows) + 1:04d}-{_plain(row.file)}.svg"
            drawing, height = draw(finding, self.question)
            (self.folder / "pictures").mkdir(exist_ok=True)
            (self.folder / name).write_text(drawing, encoding="utf-8")
            self._drawings[name] = Drawing(height=height, alternative=alternative(finding, self.question))
            row = replace(row, picture=name)
        self.rows.append(row)

    def write(self, source: str, model: dict[str, str], asked: int, fail_on: Collection[str]) -> dict[str, object]:
        """All files of FILES. asked: how many pictures there were to be. Returns what is in report.json."""
        rows, question = self.rows, self.question
        summary = summarise(rows, question, source, model, asked)
        charts = {"curve.svg": curve(rows, question), "histogram.svg": histogram(rows, question)}
        document = to_json(rows, summary)
        texts = {
            **charts,
            "images.csv": to_csv(rows),
            "report.json": json.dumps(document, ensure_ascii=False, indent=2) + "\n",
            "junit.xml": to_junit(rows, source, fail_on),
            "index.html": page(rows, self._drawings, summary, list(charts.values())),
        }
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        return document


def _plain(file: str) -> str:
    """A short name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", file.rsplit("/", 1)[-1].rsplit(".", 1)[0]).strip("-")[:40] or "picture"
