"""Tables of what benchmarks/compare_objectives.py found: docs/results.md, and the means in results/summary.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from record import RESULTS, summarise

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
SETS = ("cifar10", "caltech101", "grocery", "flowers5", "dtd10")
FIGURES = {
    "clean": "clean",
    "pgd100": "PGD-100",
    "worst_1": "worst, 1/255",
    "worst_2": "worst, 2/255",
    "worst_4": "worst, 4/255",
    "harmonic": "harmonic mean",
}
SUMMARY = {"clean": "clean_avg", "pgd100": "pgd100_avg", "worst_1": "worst_avg"}

Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "objectives", help="Runs of the small sibling.")
    parser.add_argument("--mini-results", type=Path, default=RESULTS / "objectives-mini", help="Runs of mini itself.")
    parser.add_argument("--gpu-results", type=Path, default=RESULTS / "objectives-mini-gpu", help="Those on a GPU.")
    arguments = parser.parse_args()
    small, mini, gpu = map(by_stage, (arguments.results, arguments.mini_results, arguments.gpu_results))
    text = PAGE.read_text(encoding="utf-8")
    text = filled(text, "objectives", averages(small["baseline"] + small["final"]))
    text = filled(text, "sets", per_set(small["baseline"] + small["final"]))
    text = filled(text, "rates", rates(small["tune"]))
    text = filled(text, "rate", averages(at_one_rate(small)))
    text = filled(text, "ablation", averages(small["ablation"]))
    text = filled(text, "mini", averages(gpu["baseline"] + mini["shipped"] + mini["rate"]))
    text = filled(text, "mini-gpu", averages(gpu["baseline"] + gpu["final"]))
    text = filled(text, "mini-rates", rates(gpu["tune"]))
    PAGE.write_text(text, encoding="utf-8")
    summary = summarise(means(grouped(small["final"]) | {"best": mini["shipped"]}), digits=2)
    print(f"wrote {PAGE} and {summary}")


def by_stage(results: Path) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {stage: [] for stage in ("baseline", "shipped", "tune", "final", "rate", "ablation")}
    for path in sorted(results.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["job"]["stage"]].append(run)
    return found


def at_one_rate(runs: dict[str, list[Run]]) -> list[Run]:
    """The runs of that stage, and the final ones whose chosen rate is the same."""
    found = runs["rate"]
    return found + [run for run in runs["final"] if found and run["job"]["lr"] == found[0]["job"]["lr"]]


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["job"]["name"], []).append(run)
    return groups


def shown(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def averages(runs: list[Run]) -> str:
    rows = []
    groups = grouped(runs)
    order = sorted(groups, key=lambda name: -mean(run["sets"]["average"]["harmonic"] for run in groups[name]))
    for name in order:
        found = [run["sets"]["average"] for run in groups[name]]
        rate = groups[name][0]["job"]["lr"]
        gap = shown([average["pgd100"] - average["worst_1"] for average in found])
        figures = [shown([average[key] for average in found]) for key in FIGURES]
        rows.append([name, f"{rate:.0e}" if rate else "", str(len(found)), *figures, gap])
    return table(["objective", "lr", "seeds", *FIGURES.values(), "PGD-100 less worst"], rows)


def per_set(runs: list[Run]) -> str:
    rows = []
    names = (*SETS, "tiny_imagenet")
    for name, found in grouped(runs).items():
        cells = [
            " / ".join(f"{mean(run['sets'][s][key] for run in found):.1f}" for key in ("clean", "worst_1"))
            for s in names
        ]
        rows.append([name, *cells])
    return table(["clean / worst at 1/255", *SETS, "tiny_imagenet val"], rows)


def rates(runs: list[Run]) -> str:
    found = sorted({run["job"]["lr"] for run in runs})
    rows = []
    for name, group in grouped(runs).items():
        by_rate = {run["job"]["lr"]: run["held_out"] for run in group}
        cells = [
            f"{by_rate[rate]['clean']:.1f} / {by_rate[rate]['robust']:.1f}" if rate in by_rate else "" for rate in found
        ]
        rows.append([name, *cells])
    return table(["held-out clean / PGD-10", *(f"{rate:.0e}" for rate in found)], rows)


def filled(text: str, name: str, content: str) -> str:
    """The page with what stands between the two markers of this name replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    assert after, f"{PAGE} has no markers {name}"
    return before + start + content + "\n" + end + after


def means(groups: dict[str, list[Run]]) -> dict[str, float]:
    """For summary.json, by objective; `best` is the package's mini-robust."""
    return {
        f"results.{name}.{figure}": mean(run["sets"]["average"][key] for run in group)
        for name, group in groups.items()
        for key, figure in SUMMARY.items()
    }


if __name__ == "__main__":
    main()
