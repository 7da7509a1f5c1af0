"""`pmgaft train`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("recipe")
@click.option("--output-dir", type=click.Path(file_okay=False, path_type=Path), help="The run's directory.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of the recipe. Repeatable."
)
@click.option("--data", help="The training set, in place of the recipe's: a path or a name.")
@click.option("--resume", is_flag=True, help="Go on from the run's newest whole checkpoint.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dry-run", is_flag=True, help="Print the recipe as resolved and stop.")
def train(
    recipe: str,
    output_dir: Path | None,
    settings: tuple[str, ...],
    data: str | None,
    resume: bool,
    device: str,
    dry_run: bool,
) -> None:
    """Fine-tune a model's image encoder against adversarial images.

    RECIPE is a TOML file, or the name of a shipped one: best, demo, mini-tinyimagenet, pmg-aft, release, tecoa,
    vit-b32-imagenet, vit-b32-tinyimagenet.

    \b
    Example:
      pmgaft train demo --output-dir runs/demo
      pmgaft train pmg-aft --data photos/ --set model=mini --set attack.eps=2/255 --output-dir runs/photos
      pmgaft train pmg-aft --output-dir runs/photos --resume
    """
    from pmgaft.device import pick_device
    from pmgaft.training.loop import train as run
    from pmgaft.training.recipe import load_recipe

    if output_dir is None and not dry_run:
        raise click.UsageError("say where the run goes: --output-dir RUN")
    chosen = load_recipe(recipe, [*settings, *([f"data={data}"] if data else [])])
    if dry_run or output_dir is None:
        click.echo(chosen.to_toml(), nl=False)
        return
    try:
        model = run(chosen, output_dir, device=pick_device(device), resume=resume, report=_tell)
    except KeyboardInterrupt:
        click.echo("stopped; the same command with --resume goes on from here", err=True)
        raise
    click.echo(f"model   {model}\nreport  {output_dir / 'report.md'}")


def _tell(event: str, figures: dict[str, Any]) -> None:
    shown = " ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
    click.echo(f"{event}: {shown}", err=True)
