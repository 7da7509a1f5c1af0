"""What the rows of a folder say together: verdicts, the smallest eps, and how many answers stand at each eps."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pmgaft import __version__
from pmgaft.probe.folder import Row
from pmgaft.probe.full import Question
from pmgaft.probe.settings import eps_text
from pmgaft.probe.surface import leads_of

VERDICTS = ("broken", "not_broken", "inconclusive", "error")

_TABLE = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Times the probe's eps: where the share of answers that stand is written down."""


def breaking_eps(row: Row) -> float | None:
    """The smallest eps, pixel units, at which the row's answer is known to break; None where none is known."""
    if row.document is None:
        return None
    known = []
    if row.document["min_eps"] and row.document["min_eps"]["eps_value"] is not None:
        known.append(float(row.document["min_eps"]["eps_value"]))
    if row.verdict == "broken":
        known.append(min(row.document["adversarial"]["distance_value"], row.document["threat_model"]["eps_value"]))
    return min(known, default=None)


def standing(rows: Sequence[Row], eps: float) -> float:
    """Share of the rows whose answer is not known to break within eps."""
    known = [breaking_eps(row) for row in rows]
    return sum(1 for value in known if value is None or value > eps) / len(rows)


def answered(rows: Sequence[Row]) -> list[Row]:
    """Those that have a report."""
    return [row for row in rows if row.document is not None]


def rightly_answered(rows: Sequence[Row], question: Question) -> list[Row] | None:
    """Those whose clean answer is their true label, or in one group with it; None where there are no true labels."""
    leads = dict(zip(question.labels, leads_of(question.settings.groups, len(question.labels)), strict=True))
    found = []
    for row in answered(rows):
        if row.truth is None:
            return None
        assert row.document is not None
        if leads[row.document["clean"]["label"]] == leads[row.truth]:
            found.append(row)
    return found


def curve_points(rows: Sequence[Row], question: Question) -> list[dict[str, Any]]:
    """The share of answers that stand and, with true labels, accuracy, at multiples of the probe's eps.

    Beyond that eps only where the smallest eps was searched: otherwise nobody looked there.
    """
    threat, read = question.settings.threat, answered(rows)
    right = rightly_answered(rows, question)
    last = _TABLE[-1] if question.settings.min_eps else 1.0
    radii = sorted({factor * threat.eps for factor in _TABLE if factor <= last}) if read else []
    return [
        {
            "eps": eps_text(eps, threat.norm),
            "eps_value": eps,
            "standing": standing(read, eps),
            "accuracy": None if right is None else standing(right, eps) * len(right) / len(read) if right else 0.0,
        }
        for eps in radii
    ]


def summarise(
    rows: Sequence[Row], question: Question, source: str, model: dict[str, str], asked: int
) -> dict[str, Any]:
    """For JSON. source: the folder or file, as it was named. asked: how many files there are; fewer rows mean that the
    run was stopped.
    """
    counts = Counter(row.verdict for row in rows)
    norm = question.settings.threat.norm
    known = [eps for row in answered(rows) if (eps := breaking_eps(row)) is not None]
    median = statistics.median_low(known) if known and question.settings.min_eps else None
    return {
        "source": source,
        "sentence": sentence(rows, question),
        "files": asked,
        "stopped": len(rows) < asked,
        "verdicts": {verdict: counts[verdict] for verdict in VERDICTS},
        "median_min_eps": None if median is None else eps_text(median, norm),
        "median_min_eps_value": median,
        "curve": curve_points(rows, question),
        "true_labels": rightly_answered(rows, question) is not None and bool(answered(rows)),
        "threat_model": question.settings.to_json(),
        "model": model,
        "labels": list(question.labels),
        "templates": list(question.templates),
        "pmgaft": __version__,
    }


def sentence(rows: Sequence[Row], question: Question) -> str:
    """All of it in one sentence that needs no knowledge of the field."""
    threat, read = question.settings.threat, answered(rows)
    if not read:
        return "Not one picture could be read."
    broken = sum(row.verdict == "broken" for row in rows)
    if threat.norm == "linf":
        how = f"altering no colour value by more than {255 * threat.eps:.4g} of 255 steps"
    else:
        how = f"a change of l2 norm {threat.eps:g} at most, pixels lying in [0, 1]"
    total = f"{len(read)} answer{'s' if len(read) != 1 else ''}"
    if broken:
        return f"{broken} of {total} can be changed by {how}."
    return f"This attack changed none of the {total} by {how}; another may."
