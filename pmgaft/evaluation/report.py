"""From outcomes to figures with intervals, to the JSON of a result, and to the table on screen."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pmgaft import __version__
from pmgaft.evaluation.run import Outcomes, Protocol

SCHEMA = 1

_Z = 1.959963984540054
"""97.5 % point of the normal distribution, for intervals of 95 %."""

_VERSIONS = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of images with its Wilson interval of 95 % (Wilson 1927): count of total, and low, high in [0, 1]."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high), inside [0, 1] by construction."""
        n, p, z2 = self.total, self.value, _Z**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, float]:
        """Value, interval and counts."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "count": self.count, "total": self.total}

    def __str__(self) -> str:
        """Percent, such as "48.1 [46.2, 50.0]"."""
        low, high = self.interval
        return f"{100 * self.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """One data set's outcomes and what must be known to judge them."""

    name: str
    split: str
    hash: str
    classes: Sequence[str]
    templates: Sequence[str]
    outcomes: Outcomes
    seconds: float

    @property
    def clean(self) -> Share:
        """Answered rightly, of all images."""
        return Share(count=int(self.outcomes.right.sum()), total=len(self.outcomes))

    @property
    def robust(self) -> Share:
        """Answered rightly clean and attacked, of all images."""
        return Share(count=int(self.outcomes.robust.sum()), total=len(self.outcomes))

    @property
    def commonest_answer(self) -> float:
        """Share of the most frequent clean answer: a model that always says the same is perfectly robust."""
        counts = torch.bincount(self.outcomes.clean, minlength=len(self.classes))
        return float(counts.max()) / len(self.outcomes)

    def warnings(self) -> list[str]:
        """Why the robust figure may flatter the model; empty if nothing was noticed."""
        outcomes, found = self.outcomes, []
        attacked = int(outcomes.attacked.sum())
        blind = int((outcomes.zero_gradient_share[outcomes.attacked] > 0.01).sum())
        if not bool(outcomes.finite.all()):
            found.append(f"{int((~outcomes.finite).sum())} images met gradients that are not finite")
        if blind:
            found.append(f"{blind} of {attacked} attacks saw a gradient of which more than 1 % was exactly zero")
        if self.commonest_answer > 0.5 and len(self.classes) > 2:
            found.append(f"{100 * self.commonest_answer:.0f} % of all clean answers are the same class")
        return found

    def to_json(self, protocol: Protocol) -> dict[str, Any]:
        """All figures; robust ones only where there was an attack."""
        result: dict[str, Any] = {
            "name": self.name,
            "split": self.split,
            "hash": self.hash,
            "classes": len(self.classes),
            "templates": list(self.templates),
            "images": len(self.outcomes),
            "clean": self.clean.to_json(),
            "commonest_answer": self.commonest_answer,
            "seconds": round(self.seconds, 2),
        }
        if protocol.attack == "none":
            return result
        lost = self.clean.count - self.robust.count
        success = Share(count=lost, total=self.clean.count).to_json() if self.clean.count else None
        attacked = self.outcomes.zero_gradient_share[self.outcomes.attacked]
        return result | {
            "robust": self.robust.to_json(),
            "attack_success": success,
            "zero_gradient_share": float(attacked.mean()) if len(attacked) else 0.0,
            "warnings": self.warnings(),
        }


def result_json(
    model: dict[str, Any], protocol: Protocol, sets: Sequence[SetResult], device: str, outcomes_file: str
) -> dict[str, Any]:
    """The whole result: what was attacked, how, with what, and what came out."""
    budget = protocol.budget
    attack: dict[str, Any] = {"name": protocol.attack}
    if protocol.attack != "none":
        attack |= {
            "threat_model": protocol.threat.to_json(),
            "loss": "cross entropy (as log odds)",
            "steps": budget.steps,
            "step_size": budget.step_for(protocol.threat.eps),
            "restarts": budget.restarts,
            "random_start": budget.random_start,
            "kept": "best point of each image",
            "precision": "float32",
            "seed": protocol.seed,
        }
    shares = {"clean": [s.clean.value for s in sets], "robust": [s.robust.value for s in sets]}
    if protocol.attack == "none":
        del shares["robust"]
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "attack": attack,
        "definitions": {
            "clean": "share of all images answered rightly",
            "robust": "share of all images answered rightly both clean and attacked",
            "attack_success": "share of the images answered rightly when clean that no longer are",
        },
        "sets": [s.to_json(protocol) for s in sets],
        "average": {name: sum(values) / len(values) for name, values in shares.items()},
        "outcomes": outcomes_file,
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "device": device,
            "threads": torch.get_num_threads(),
        },
        "versions": {"pmgaft": __version__} | {name: version(name) for name in _VERSIONS},
    }


def write_result(path: Path, result: dict[str, Any], sets: Sequence[SetResult]) -> None:
    """The result in `path`, and one row per image in the parquet file that it names; each written beside, then renamed.

    Columns: set, index, label, clean, adversarial, attacked, robust, finite, zero_gradient_share.
    """
    tables = []
    for judged in sets:
        columns = {name: getattr(judged.outcomes, name).numpy() for name in Outcomes.__dataclass_fields__}
        tables.append(pa.table({"set": [judged.name] * len(judged.outcomes)} | columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.concat_tables(tables), scratch)
    scratch.replace(path.with_name(result["outcomes"]))
    scratch.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def table_rows(sets: Sequence[SetResult], protocol: Protocol) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for the terminal: percent with intervals of 95 %, and the average over several sets."""
    attacked = protocol.attack != "none"
    columns = ["set", "images", "clean %", *(["robust %"] if attacked else [])]
    rows = [[s.name, str(len(s.outcomes)), str(s.clean), *([str(s.robust)] if attacked else [])] for s in sets]
    if len(sets) > 1:
        averages = [[s.clean.value for s in sets], *([[s.robust.value for s in sets]] if attacked else [])]
        rows.append(["average", "", *(f"{100 * sum(values) / len(sets):.1f}" for values in averages)])
    return columns, rows
