"""`pmgaft blend`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pmgaft.errors import InputError
from pmgaft.evaluation.options import Asked, bar_for, evaluation_options, show

if TYPE_CHECKING:
    from pmgaft.clip.loading import Clip


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--pretrained-a", help="Tag or file of A's weights, where its name needs one.")
@click.option("--pretrained-b", help="The same for B.")
@click.option("--weight", required=True, help="Of B, from 0 to 1; with --dataset several, such as 0,0.25,0.5,0.75,1.")
@click.option("--output-dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="What is written.")
@evaluation_options
def blend(
    a: str,
    b: str,
    pretrained_a: str | None,
    pretrained_b: str | None,
    weight: str,
    output_dir: Path,
    **options: Any,
) -> None:
    """Mix the weights of two image towers.

    A and B are variants of one model, usually before and after pmgaft train: (1 - weight) A + weight B. Without
    --dataset, the blend is written in open_clip's local-dir form, which every command takes as a model. With
    --dataset, the blend at each weight is evaluated instead, as pmgaft evaluate would, and table and picture show what
    each weight buys.

    \b
    Example:
      pmgaft blend mini mini-robust --weight 0.6 --output-dir models/middle
      pmgaft blend mini mini-robust --weight 0,0.25,0.5,0.75,1 --dataset data/cifar10 --limit 500 --output-dir slider
    """
    from pmgaft import console
    from pmgaft.blend import blended, unlike
    from pmgaft.clip.loading import load_clip
    from pmgaft.device import float32_products, pick_device
    from pmgaft.errors import ModelError
    from pmgaft.ranks import joined

    asked = Asked(**options)
    weights = _weights(weight)
    if not asked.datasets and len(weights) > 1:
        raise click.UsageError("one weight gives a model; to evaluate several, name a --dataset")
    if not asked.datasets and output_dir.exists() and any(output_dir.iterdir()) and not asked.force:
        raise InputError(f"{output_dir} is not empty; name another --output-dir, or overwrite it with --force")
    with float32_products(tf32=False), joined(pick_device(asked.device)) as (ranks, device):
        if ranks.first:
            console.note(f"reading {a} and {b}")
        one, other = load_clip(a, pretrained_a, device), load_clip(b, pretrained_b, device)
        difference = unlike(one, other)
        if difference:
            raise ModelError(f"{a} and {b} cannot be blended: {difference}")
        if asked.datasets:
            _slide(one, other, weights, asked, output_dir, device, ranks)
        elif ranks.first:
            _save(blended(one, other, weights[0]), _facts(one, other, weights[0]), output_dir)
            console.note(f"model {output_dir}; next: pmgaft evaluate {output_dir} --dataset ...")


def _save(clip: Clip, facts: dict[str, Any], output_dir: Path) -> None:
    from pmgaft.clip.loading import save_local_dir

    save_local_dir(clip.open_clip_model, clip.open_clip_config, output_dir, clip.tokenizer)
    (output_dir / "blend.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _slide(
    one: Clip, other: Clip, weights: list[float], asked: Asked, output_dir: Path, device: Any, ranks: Any
) -> None:
    from pmgaft import console
    from pmgaft.blend import blended
    from pmgaft.evaluation.plots import can_plot, plot_slider
    from pmgaft.evaluation.report import markdown_table
    from pmgaft.evaluation.session import Session
    from pmgaft.evaluation.work import write_atomically

    settings, sets = asked.settings(), asked.sets()
    points: list[tuple[float, dict[str, Any]]] = []
    for weight in weights:
        clip, output = blended(one, other, weight), output_dir / f"weight-{weight:g}.json"
        if ranks.first:
            console.note(f"{clip.name} on {device}; {settings.protocol}")
        session = Session(
            clip=clip,
            sets=sets,
            settings=settings,
            output=output,
            device=device,
            ranks=ranks,
            facts=_facts(one, other, weight),
            bar=bar_for(ranks),
        )
        result = session.run(resume=asked.resume, force=asked.force)
        if ranks.first:
            show(result, output)
            points.append((weight, result))
    if not ranks.first:
        return
    columns, rows = slider_table(points)
    lines = [f"# {one.name} (weight 0) to {other.name} (weight 1)", "", f"{settings.protocol}", ""]
    lines += ["Averages over the sets, percent.", "", *markdown_table(columns, rows)]
    if can_plot():
        plot_slider(points, (one.name, other.name), output_dir / "slider.png")
        lines += ["", "![slider](slider.png)"]
    write_atomically(output_dir / "slider.md", ("\n".join(lines) + "\n").encode())
    console.print_table(columns, rows)
    console.note(f"written: {output_dir / 'slider.md'}")


def slider_table(points: list[tuple[float, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: what each weight gives on average, percent; "!" where a self-check failed."""
    from pmgaft.evaluation.report import positive_eps

    radii = positive_eps(points[0][1])
    rows = []
    for weight, result in points:
        average = result["average"]
        values = [average["clean"], *(average["robust"][eps] for eps in radii)]
        mark = "" if result["checks"]["passed"] else " !"
        rows.append([f"{weight:g}{mark}", *(f"{100 * value:.1f}" for value in values)])
    return ["weight", "clean %", *(f"{eps} %" for eps in radii)], rows


def _weights(text: str) -> list[float]:
    try:
        weights = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise InputError(f"--weight is a number, or several with commas, not {text!r}", field="weight") from error
    outside = next((weight for weight in weights if not 0 <= weight <= 1), None)
    if outside is not None:
        raise InputError(f"a weight lies in [0, 1], unlike {outside:g}", field="weight")
    return weights


def _facts(one: Clip, other: Clip, weight: float) -> dict[str, Any]:
    from pmgaft.clip.loading import tensors_hash

    parts = [{"name": c.name, "pretrained": c.spec.pretrained, "hash": tensors_hash(c.image)} for c in (one, other)]
    names = f"{1 - weight:g} {one.name} + {weight:g} {other.name}"
    return {"name": names, "blend": {"weight": weight, "a": parts[0], "b": parts[1]}}
