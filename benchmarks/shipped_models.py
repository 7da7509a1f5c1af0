"""Clean and PGD-10 accuracy of the shipped models, and the figures of summary.json that come from them.

python benchmarks/shipped_models.py --data-root DATA [--limit N]

Runs `pmgaft evaluate` (eps 1/255, 10 steps of 0.25/255) and writes results/evaluate-MODEL.json with its parquet of
per-image outcomes; then takes the figures into results/summary.json, leaving those of others as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import click
from record import RESULTS, summarise

MODELS = ("mini", "mini-robust")
ZERO_SHOT = ("cifar10", "caltech101", "grocery", "flowers5", "dtd10")
SETS = (*(f"zeroshot/{name}" for name in ZERO_SHOT), "tiny_imagenet")


def evaluate(model: str, data_root: Path, limit: int | None) -> None:
    """One `pmgaft evaluate`, as a person would type it."""
    command = [sys.executable, "-m", "pmgaft", "evaluate", model, "--force"]
    command += [word for name in SETS for word in ("--dataset", str(data_root / name))]
    command += ["--attack", "pgd", "--eps", "1/255", "--steps", "10"]
    command += ["--limit", str(limit)] if limit else []
    subprocess.run([*command, "--output", str(RESULTS / f"evaluate-{model}.json")], check=True)


def figures() -> dict[str, float]:
    """Percent by set and model, and the two ratios over the zero-shot sets."""
    percent = {}
    for model in MODELS:
        result = json.loads((RESULTS / f"evaluate-{model}.json").read_text())
        for entry in result["sets"]:
            name = f"{model.replace('-', '_')}.{entry['name']}"
            percent[f"{name}_clean"] = 100 * entry["clean"]["value"]
            percent[f"{name}_pgd10"] = 100 * entry["robust"]["1/255"]["value"]

    def average(model: str, kind: str) -> float:
        return mean(percent[f"{model}.{name}_{kind}"] for name in ZERO_SHOT)

    kept = 100 * average("mini_robust", "clean") / average("mini", "clean")
    share = 100 * average("mini_robust", "pgd10") / average("mini_robust", "clean")
    return percent | {"mini_robust.clean_kept": kept, "mini_robust.robust_share": share}


@click.command()
@click.option("--data-root", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", type=int, help="Images a set; left out: all of them.")
def main(data_root: Path, limit: int | None) -> None:
    for model in MODELS:
        evaluate(model, data_root, limit)
    summarise(figures(), digits=2)


if __name__ == "__main__":
    main()
