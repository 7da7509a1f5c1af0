"""RUN/report.md: what a run did and what came out, told from its own log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmgaft.threat import format_eps
from pmgaft.training.log import read_log
from pmgaft.training.recipe import Recipe

_ROWS = 12
"""Training steps shown in the table, evenly spread."""


def write_report(directory: Path, recipe: Recipe) -> Path:
    """Write report.md beside the log."""
    path = directory / "report.md"
    path.write_text("\n".join(_lines(read_log(directory), recipe)) + "\n", encoding="utf-8")
    return path


def _lines(events: list[dict[str, Any]], recipe: Recipe) -> list[str]:
    facts = next(event for event in events if event["event"] in ("start", "resume"))
    end = events[-1]
    attack, objective = recipe.attack, recipe.objective
    images = f"{facts['images']} images of {facts['classes']} classes, {facts['held_out']} more held out"
    minutes = f"{end['seconds'] / 60:.1f} minutes"
    devices = facts["device"] if facts["ranks"] == 1 else f"{facts['ranks']} ranks, the first on {facts['device']}"
    rounding = "rounded to TF32 on a GPU" if facts["tf32"] else "in full"
    lines = [
        "# Training run",
        "",
        f"- Model: {facts['model']} (image encoder sha256 {facts['model_hash'][:12]})",
        f"- Data: {facts['data']} (hash {facts['data_hash'][:19]}), {images}",
        f"- Objective: {objective.name}, guide over {facts['guide_texts']} texts",
        f"- Attack in training: linf, eps {format_eps(attack.eps)}, {attack.steps} steps, model-input grid",
        f"- Precision: objective {facts['precision']}, attack {facts['attack_precision']}, float32 products {rounding}",
        f"- Done: {end['step']} steps of {recipe.batch} images, {minutes} on {devices}, torch {facts['torch']}",
        "",
        "The whole recipe is in recipe.toml, every logged figure in log.jsonl.",
    ]
    return lines + _judged([e for e in events if e["event"] == "judged"]) + _steps(events)


def _judged(judged: list[dict[str, Any]]) -> list[str]:
    if not judged:
        return ["", "No images were held out: the model is the one after the last step."]
    best = [event for event in judged if event["best"]][-1]["step"]
    rows = [(e["step"], e["clean"], e["robust"], "kept" if e["step"] == best else "") for e in judged]
    return [
        "",
        "## Held-out training images",
        "",
        "Shares of all held-out images, percent; robust: right when clean and under PGD-10 at the full eps.",
        "",
        "| step | clean | robust | |",
        "|---|---|---|---|",
        *(f"| {step} | {100 * clean:.1f} | {100 * robust:.1f} | {note} |" for step, clean, robust, note in rows),
    ]


def _steps(events: list[dict[str, Any]]) -> list[str]:
    steps = [event for event in events if event["event"] == "step"]
    if not steps:
        return []
    shown = steps[:: max(1, len(steps) // _ROWS)]
    terms = [key for key in steps[-1] if key.startswith("loss_")]
    shares = [key for key in ("clean_accuracy", "robust_accuracy") if key in steps[-1]]
    names = [term.removeprefix("loss_") for term in terms] + [
        share.removesuffix("_accuracy") + " %" for share in shares
    ]
    header = ["step", "loss", *names, "lr", "eps", "images/s"]
    rows = [
        [
            str(e["step"]),
            *(f"{e[key]:.4f}" for key in ("loss", *terms)),
            *(f"{100 * e[key]:.1f}" for key in shares),
            f"{e['lr']:.2e}",
            f"{255 * e['eps']:.3g}/255",
            f"{e['images_per_second']:.1f}",
        ]
        for e in shown
    ]
    return [
        "",
        "## Training",
        "",
        "Terms are shown unweighted; clean and robust: of the step's own batch, under the training attack.",
        "",
        *("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]),
    ]
