"""`pmgaft evaluate`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pmgaft.errors import InputError
from pmgaft.evaluation.options import Asked, bar_for, evaluation_options, show


@click.command()
@click.argument("model")
@click.option("--pretrained", help="Tag or file of weights, where the model's name needs one.")
@evaluation_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The result, a .json file.")
def evaluate(model: str, pretrained: str | None, output: Path | None, **options: Any) -> None:
    """Measure clean and robust accuracy on data sets.

    MODEL is a shipped model, a run of pmgaft train, or anything else that pmgaft train takes as model. An image counts
    as robust if it is answered rightly when clean and under every attack; those answered wrongly when clean are not
    attacked. Writes the result (JSON, and the same as Markdown and picture), and a .parquet file with one row per image
    and eps. Under torchrun the images are shared out over the processes.

    \b
    Example:
      pmgaft evaluate mini-robust --dataset data/cifar10 --dataset data/caltech101 --eps 0,1/255,2/255 --limit 500
      pmgaft evaluate runs/mine --dataset photos/ --attack pgd-ce:100 --attack apgd-ce --attack apgd-dlr --resume
    """
    from pmgaft import console
    from pmgaft.clip.loading import load_clip
    from pmgaft.device import float32_products, pick_device
    from pmgaft.evaluation.plots import can_plot, plot_result
    from pmgaft.evaluation.session import Session, model_facts
    from pmgaft.ranks import joined

    asked = Asked(**options)
    if not asked.datasets:
        raise click.UsageError("say what to judge it on: --dataset NAME_OR_PATH")
    settings = asked.settings()
    output = output or default_output(model)
    if output.suffix != ".json":
        raise InputError(f"--output names a .json file, not {output}")
    with float32_products(tf32=False), joined(pick_device(asked.device)) as (ranks, device):
        tell = console.note if ranks.first else lambda message: None
        tell(f"reading model {model} and the data")
        clip = load_clip(model, pretrained, device)
        sets = asked.sets()
        processes = f", {ranks.world} processes" if ranks.world > 1 else ""
        tell(f"{clip.name} on {device}{processes}; {settings.protocol}")
        session = Session(
            clip=clip,
            sets=sets,
            settings=settings,
            output=output,
            device=device,
            ranks=ranks,
            facts=model_facts(model, pretrained),
            bar=bar_for(ranks),
            plot=plot_result if can_plot() else None,
        )
        result = session.run(resume=asked.resume, force=asked.force)
    if result and ranks.first:
        show(result, output)


def default_output(model: str) -> Path:
    """Inside a run's directory, where `pmgaft compare` looks for it; else in the current one."""
    directory = Path(model)
    if (directory / "recipe.toml").is_file():
        return directory / "evaluation.json"
    return Path(f"evaluation-{directory.name}.json")
