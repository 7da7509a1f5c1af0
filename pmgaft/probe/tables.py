"""A folder's rows for programs: CSV, JSON and JUnit."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import Any
from xml.etree import ElementTree

from pmgaft.probe.folder import Row
from pmgaft.probe.svg import xml_text

COLUMNS = (
    "file",
    "true_label",
    "verdict",
    "reason",
    "clean_label",
    "clean_probability",
    "margin",
    "adversarial_label",
    "adversarial_probability",
    "distance",
    "min_eps",
    "min_eps_value",
    "min_eps_label",
    "first_order_value",
    "failed_checks",
    "templates_that_change_it",
    "gradients",
    "seconds",
    "picture",
    "sha256",
    "id",
)


def to_csv(rows: Sequence[Row]) -> str:
    """A line for each row, in order, under COLUMNS; what is not known is empty. Distances are in pixel units."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_cells(row) for row in rows)
    return text.getvalue()


def to_json(rows: Sequence[Row], summary: dict[str, Any]) -> dict[str, Any]:
    """Summary and rows; `report` is what `pmgaft probe IMAGE --json` prints."""
    return {
        "summary": summary,
        "images": [
            {
                "file": row.file,
                "true_label": row.truth,
                "verdict": row.verdict,
                "error": row.error,
                "picture": row.picture,
                "report": row.document,
            }
            for row in rows
        ],
    }


def to_junit(rows: Sequence[Row], name: str, fail_on: Collection[str]) -> str:
    """A test case for each row. fail_on: verdicts that are failures. An unreadable file is an error where
    "inconclusive" is one of them; what says nothing and fails nothing counts as skipped.
    """
    suite = ElementTree.Element("testsuite", name=xml_text(name), tests=str(len(rows)))
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for row in rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname="pmgaft.probe", name=xml_text(row.file), time=f"{row.seconds:.3f}"
        )
        said = xml_text(row.error or (row.document or {}).get("statement", ""))
        outcome = _outcome(row, fail_on)
        if outcome is None:
            ElementTree.SubElement(case, "system-out").text = said
        else:
            counts[outcome] += 1
            ElementTree.SubElement(case, outcome, type=row.verdict, message=said)
    suite.set("failures", str(counts["failure"]))
    suite.set("errors", str(counts["error"]))
    suite.set("skipped", str(counts["skipped"]))
    suite.set("time", f"{sum(row.seconds for row in rows):.3f}")
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _outcome(row: Row, fail_on: Collection[str]) -> str | None:
    """The name of the element that says so; None for a case that passed."""
    if row.verdict == "error":
        return "error" if "inconclusive" in fail_on else "skipped"
    if row.verdict in fail_on:
        return "failure"
    return "skipped" if row.verdict == "inconclusive" else None


def _cells(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "file": row.file,
        "true_label": row.truth,
        "verdict": row.verdict,
        "reason": row.error,
        "picture": row.picture,
        "seconds": f"{row.seconds:.3f}",
    }
    if row.document is None:
        return cells
    found, least, after = row.document, row.document["min_eps"] or {}, row.document["adversarial"] or {}
    return cells | {
        "reason": found["reason"],
        "clean_label": found["clean"]["label"],
        "clean_probability": found["clean"]["probability"],
        "margin": found["clean"]["margin"],
        "adversarial_label": after.get("label"),
        "adversarial_probability": after.get("probability"),
        "distance": after.get("distance_value"),
        "min_eps": least.get("eps"),
        "min_eps_value": least.get("eps_value"),
        "min_eps_label": least.get("label"),
        "first_order_value": least.get("first_order_value"),
        "failed_checks": " ".join(check["name"] for check in found["health"] if check["passed"] is False),
        "templates_that_change_it": len(found["wording"]["flipped_by_template"]) if found["wording"] else None,
        "gradients": found["gradients"],
        "sha256": found["image"]["sha256"],
        "id": found["id"],
    }
