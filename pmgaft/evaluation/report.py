"""From outcomes to figures with intervals, to the JSON of a result, its rows, and its tables."""

from __future__ import annotations

import io
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pmgaft import __version__
from pmgaft.attacks.autoattack import standard_attacks
from pmgaft.evaluation.checks import Check
from pmgaft.evaluation.classes import Classes
from pmgaft.evaluation.protocol import AUTOATTACK, Protocol
from pmgaft.evaluation.run import NOT_RUN, STOOD, Outcomes

SCHEMA = 2

MARK = "!"
"""Beside the name of a set with a failed self-check."""

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
        """(low, high), inside [0, 1], with the value between them: what rounding takes from that is given back."""
        n, p, z2 = self.total, self.value, _Z**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))

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
    """One data set's outcomes, in the order of its images, and what must be known to judge them."""

    name: str
    split: str
    hash: str
    names: Sequence[str]
    classes: Classes
    templates: Sequence[str]
    outcomes: Outcomes
    checks: Sequence[Check]
    seconds: float

    @property
    def clean(self) -> Share:
        """Answered rightly, of all images."""
        return Share(count=int(self.outcomes.right.sum()), total=len(self.outcomes))

    def robust(self, ball: int) -> Share:
        """Answered rightly clean and under every attack in this and all smaller balls, of all images."""
        return Share(count=int(self.outcomes.robust[:, ball].sum()), total=len(self.outcomes))

    @property
    def failed(self) -> list[Check]:
        """The self-checks that say: do not believe this."""
        return [check for check in self.checks if check.passed is False]

    def to_json(self, protocol: Protocol) -> dict[str, Any]:
        """All figures; robust ones only where there was an attack."""
        result: dict[str, Any] = {
            "name": self.name,
            "split": self.split,
            "hash": self.hash,
            "classes": len(self.names),
            "classes_told_apart": len(self.classes),
            "merged_classes": [
                [{"label": label, "name": name} for label, name in group] for group in self.classes.merged
            ],
            "templates": list(self.templates),
            "images": len(self.outcomes),
            "clean": self.clean.to_json(),
        }
        if protocol.attacks:
            result["robust"] = {
                str(threat.to_json()["eps"]): self.robust(ball).to_json() | {"attacks": self._attacks(protocol, ball)}
                for ball, threat in enumerate(protocol.threats)
            }
            result["gradients"] = int(self.outcomes.gradients.sum())
        return result | {
            "forwards": int(self.outcomes.forwards.sum()),
            "checks": [check.to_json() for check in self.checks],
            "seconds": round(self.seconds, 2),
        }

    def _attacks(self, protocol: Protocol, ball: int) -> list[dict[str, Any]]:
        """Per attack: on how many it was run, how many it broke, and what stands after it and all before it."""
        if protocol.threats[ball].eps == 0:
            return []
        found, total = [], len(self.outcomes)
        for place, attack in enumerate(protocol.attacks):
            verdicts, alone = self.outcomes.stood[:, ball, place], self.outcomes.standing_alone(ball, place)
            after = self.outcomes.standing_after(ball, place)
            found.append(
                {
                    "name": str(attack),
                    **({"runs": standard_attacks(len(self.classes))} if attack.name == AUTOATTACK else {}),
                    "images": int((verdicts != NOT_RUN).sum()),
                    "stood": int((verdicts == STOOD).sum()),
                    "after": Share(count=int(after.sum()), total=total).to_json(),
                    "alone": None if alone is None else Share(count=int(alone.sum()), total=total).to_json(),
                }
            )
        return found

    def rows(self, protocol: Protocol) -> pa.Table:
        """One row per image and ball; labels are the set's own, of merged classes the first."""
        outcomes, first = self.outcomes, self.classes.first_label
        names = [attack.name for attack in protocol.attacks]
        tables = []
        for ball, threat in enumerate(protocol.threats):
            by = [names[place] if place >= 0 else None for place in outcomes.broken_by(ball).tolist()]
            columns: dict[str, Any] = {
                "set": [self.name] * len(outcomes),
                "index": outcomes.index.numpy(),
                "label": first[outcomes.label].numpy(),
                "clean": first[outcomes.clean].numpy(),
                "eps": [threat.eps] * len(outcomes),
                "robust": outcomes.robust[:, ball].numpy(),
                "adversarial": first[outcomes.adversarial[:, ball]].numpy(),
                "broken_by": pa.array(by, pa.string()),
            }
            for place, name in enumerate(names):
                codes = outcomes.stood[:, ball, place].tolist()
                columns[f"stood_{name.replace('-', '_')}"] = pa.array(
                    [None if c == NOT_RUN else c == STOOD for c in codes], pa.bool_()
                )
            columns |= {
                field: getattr(outcomes, field).numpy()
                for field in ("finite", "inside", "zero_gradient_share", "gradients", "forwards")
            }
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)


def result_json(
    model: Mapping[str, Any],
    protocol: Protocol,
    sets: Sequence[SetResult],
    outcomes_file: str,
    asked: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The whole result: what was attacked, how, with what, and what came out."""
    trained_on = model.get("trained_on")
    others = [s for s in sets if s.name != trained_on]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": dict(model),
        "protocol": protocol.to_json(),
        "definitions": {
            "clean": "share of all images answered rightly",
            "robust": "share of all images answered rightly when clean and under every attack, at this and smaller eps",
            "alone": "share of all images answered rightly when clean and under this one attack",
            "after": "share of all images answered rightly when clean, at smaller eps, and after this and all earlier "
            "attacks",
        },
        "sets": [s.to_json(protocol) for s in sets],
        "average": _average(sets, protocol),
    }
    if others and len(others) < len(sets):
        result["average_without_training_set"] = _average(others, protocol)
    return result | {
        "checks": {
            "passed": not any(s.failed for s in sets),
            "failed": [f"{s.name}: {check.name}" for s in sets for check in s.failed],
        },
        "asked": dict(asked),
        "outcomes": outcomes_file,
        "code": code_version(),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
        },
        "versions": {"pmgaft": __version__} | {name: version(name) for name in _VERSIONS},
    }


def code_version() -> dict[str, str | bool | None]:
    """The commit this code is at, where it runs from a checkout, and whether files differ from it."""
    here = Path(__file__).parents[2]
    facts: dict[str, str | bool | None] = {"version": __version__, "commit": None}
    if (here / ".git").exists():
        commit = _git(here, "rev-parse", "HEAD")
        if commit:
            changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", "pmgaft")
            facts |= {"commit": commit, "changed": bool(changed)}
    return facts


def _git(where: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, check=False, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _average(sets: Sequence[SetResult], protocol: Protocol) -> dict[str, Any]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    average: dict[str, Any] = {"sets": len(sets), "clean": mean([s.clean.value for s in sets])}
    if protocol.attacks:
        average["robust"] = {
            str(threat.to_json()["eps"]): mean([s.robust(ball).value for s in sets])
            for ball, threat in enumerate(protocol.threats)
        }
    return average


def parquet_bytes(sets: Sequence[SetResult], protocol: Protocol) -> bytes:
    """The rows of all sets as a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.concat_tables([s.rows(protocol) for s in sets]), buffer)
    return buffer.getvalue()


def positive_eps(result: Mapping[str, Any]) -> list[str]:
    """The radii above 0 as the result writes them, rising; none where nothing was attacked."""
    if not result["protocol"]["attacks"]:
        return []
    return [str(model["eps"]) for model in result["protocol"]["threat_models"] if model["eps_value"] > 0]


def accuracy_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: percent with intervals of 95 %, robust under its eps; sets with failed checks are marked."""
    radii = list(result["sets"][0].get("robust", {}))
    columns = ["set", "images", "clean %", *(f"{eps} %" for eps in radii)]
    rows = []
    for entry in result["sets"]:
        failed = any(check["passed"] is False for check in entry["checks"])
        shares = [entry["clean"], *(entry["robust"][eps] for eps in radii)]
        shown = [str(Share(count=share["count"], total=share["total"])) for share in shares]
        rows.append([entry["name"] + (f" {MARK}" if failed else ""), str(entry["images"]), *shown])
    averages = {"average": result["average"]} if len(result["sets"]) > 1 else {}
    if "average_without_training_set" in result:
        averages["without " + result["model"]["trained_on"]] = result["average_without_training_set"]
    for name, average in averages.items():
        values = [average["clean"], *(average["robust"][eps] for eps in radii)]
        rows.append([name, "", *(f"{100 * value:.1f}" for value in values)])
    return columns, rows


def attacks_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what each attack leaves, alone (where it was run on all) and after all before; percent."""
    rows = []
    for entry in result["sets"]:
        for eps, share in entry.get("robust", {}).items():
            for attack in share["attacks"]:
                alone = "" if attack["alone"] is None else f"{100 * attack['alone']['value']:.1f}"
                rows.append([entry["name"], eps, attack["name"], alone, f"{100 * attack['after']['value']:.1f}"])
    return ["set", "eps", "attack", "alone %", "so far %"], rows


def checks_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: every self-check of every set."""
    words = {True: "ok", False: "FAILED", None: "-"}
    found = [{check["name"]: words[check["passed"]] for check in entry["checks"]} for entry in result["sets"]]
    names = dict.fromkeys(name for checks in found for name in checks)
    rows = [[name, *(checks.get(name, "-") for checks in found)] for name in names]
    return ["self-check", *(entry["name"] for entry in result["sets"])], rows


def markdown(result: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The result as a page, with the plots that lie beside it."""
    model, protocol = result["model"], result["protocol"]
    lines = [f"# {model['name']}", ""]
    lines += [f"- model: {model['name']}, sha256 {model['hash'][:16]}"]
    if protocol["attacks"]:
        threat = protocol["threat_models"][-1]
        eps = ", ".join(entry["eps"] for entry in protocol["threat_models"])
        names = ", ".join(attack_text(attack) for attack in protocol["attacks"])
        lines += [
            f"- threat model: {threat['norm']}, eps {eps}, {threat['grid']} grid",
            f"- attacks, worst case per image: {names}; float32, seed {protocol['seed']}",
        ]
    code = result["code"]
    commit = f", commit {code['commit'][:12]}{' with changes' if code['changed'] else ''}" if code["commit"] else ""
    lines += [f"- code: pmgaft {code['version']}{commit}; torch {result['versions']['torch']}", ""]
    lines += [
        "Percent of all images: clean, and robust at each eps; Wilson intervals of 95 %.",
        "",
        *markdown_table(*accuracy_table(result)),
    ]
    if len(protocol["attacks"]) > 1:
        lines += [
            "",
            "## By attack",
            "",
            "So far: after it and all before.",
            "",
            *markdown_table(*attacks_table(result)),
        ]
    lines += [line for plot in plots for line in ("", f"![{Path(plot).stem}]({plot})")]
    lines += ["", "## Self-checks", "", *markdown_table(*checks_table(result)), ""]
    for entry in result["sets"]:
        for check in entry["checks"]:
            mark = {True: "", False: "**failed** ", None: "not made: "}[check["passed"]]
            lines.append(f"- {entry['name']}, {check['name']}: {mark}{check['said']}")
    merged = [(entry["name"], group) for entry in result["sets"] for group in entry["merged_classes"]]
    if merged:
        lines += ["", "## Classes that the model cannot tell apart", "", "Each group was judged as one class.", ""]
        lines += [f"- {name}: " + ", ".join(f"{c['name']} ({c['label']})" for c in group) for name, group in merged]
    return "\n".join(lines) + "\n"


def attack_text(attack: Mapping[str, Any]) -> str:
    """An attack of a result's protocol, such as "apgd-ce (50 steps)"."""
    if "steps" not in attack:
        return f"{attack['name']} ({attack['settings']})"
    restarts = f", {attack['restarts']} restarts" if attack["restarts"] > 1 else ""
    return f"{attack['name']} ({attack['steps']} {'queries' if attack['name'] == 'square' else 'steps'}{restarts})"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines: the first column to the left, all others, being figures, to the right."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in [columns, rule, *rows]]
