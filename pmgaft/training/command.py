"""`pmgaft train`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
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
@click.option("--changed", is_flag=True, help="With --resume: go on even though the recipe is another by now.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--tensorboard", is_flag=True, help="Write RUN/tensorboard for TensorBoard.")
@click.option("--metrics-port", type=click.IntRange(0, 65535), metavar="PORT", help="Serve figures to Prometheus.")
@click.option("--dry-run", is_flag=True, help="Print the recipe as resolved and stop.")
def train(
    recipe: str,
    output_dir: Path | None,
    settings: tuple[str, ...],
    data: str | None,
    resume: bool,
    changed: bool,
    device: str,
    tensorboard: bool,
    metrics_port: int | None,
    dry_run: bool,
) -> None:
    """Fine-tune a model's image encoder against adversarial images.

    RECIPE is a TOML file, or the name of a shipped one:

    \b
      demo, best, best-finish, mini-tinyimagenet
      pmg-aft, release, tecoa, fare, caw, agft, ucat, finetune
      vit-b32-tinyimagenet, vit-b32-imagenet, vit-b32-release, vit-b32-tecoa, vit-b32-fare
      vit-b32-caw, vit-b32-agft, vit-b32-ucat, vit-b32-tga-zsr, vit-b32-finetune

    \b
    Example:
      pmgaft train demo --output-dir runs/demo
      pmgaft train pmg-aft --data photos/ --set model=mini --set attack.eps=2/255 --output-dir runs/photos
      pmgaft train pmg-aft --output-dir runs/photos --resume
      torchrun --nproc-per-node 8 -m pmgaft train vit-b32-imagenet --data imagenet/ --output-dir runs/b32
    """
    from pmgaft import console
    from pmgaft.device import pick_device
    from pmgaft.ranks import speaks
    from pmgaft.training.loop import train as run
    from pmgaft.training.recipe import load_recipe
    from pmgaft.training.telemetry import Metrics, TensorBoard

    if output_dir is None and not dry_run:
        raise click.UsageError("say where the run goes: --output-dir RUN")
    chosen = load_recipe(recipe, [*settings, *([f"data={data}"] if data else [])])
    if dry_run or output_dir is None:
        click.echo(chosen.to_toml(), nl=False)
        return
    if changed and not resume:
        raise click.UsageError("--changed goes with --resume")
    with _Screen() as screen:
        reports = []
        if speaks():
            console.note(f"reading model {chosen.model} and data {chosen.data}")
            reports.append(screen.show)
            if tensorboard:
                reports.append(TensorBoard(output_dir / "tensorboard").show)
            if metrics_port is not None:
                metrics = Metrics(metrics_port)
                reports.append(metrics.show)
                console.note(f"figures for Prometheus at http://localhost:{metrics.port}/metrics")

        def report(event: str, figures: dict[str, Any]) -> None:
            for show in reports:
                show(event, figures)

        try:
            model = run(chosen, output_dir, device=pick_device(device), resume=resume, changed=changed, report=report)
        except KeyboardInterrupt:
            if speaks():
                console.note("stopped after a whole step; the same command with --resume goes on from there")
            raise
    if speaks():
        click.echo(f"model   {model}\nreport  {output_dir / 'report.md'}")


class _Screen(contextlib.ExitStack):
    """What a run tells, for a person: a bar while it moves, a line for what stays."""

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._advance: Callable[[int, str], None] | None = None
        self._step = 0
        self._said = time.monotonic()

    def show(self, event: str, figures: dict[str, Any]) -> None:
        """Called with every event of the run."""
        from pmgaft import console

        if event in ("start", "resume"):
            self._step = figures.get("step", 0)
            alongside = f" and {figures['ranks'] - 1} more" if figures["ranks"] > 1 else ""
            if figures.get("changed"):
                console.note(f"the recipe has another {', '.join(figures['changed'])} from here on")
            console.note(
                _RESOLVED.format(**figures, alongside=alongside)
                + (f", going on from step {self._step}" if self._step else "")
            )
            if figures["same_names"]:
                console.note(_SAME_NAMES.format(names=", ".join(map(repr, figures["same_names"]))))
            self._advance = self.enter_context(console.progress("training", figures["steps"], "steps"))
            self._advance(self._step, "")
        elif event == "step" and self._advance is not None:
            status = _status(figures)
            self._advance(figures["step"] - self._step, status)
            self._step = figures["step"]
            self._line(f"step {self._step}: {status}, {_duration(figures['seconds_left'])} left")
        elif event == "judged":
            kept = ", best so far" if figures["best"] else ""
            shares = f"clean {100 * figures['clean']:.1f} %, robust {100 * figures['robust']:.1f} %"
            console.note(f"step {figures['step']}: held-out images {shares}{kept}")
        elif event == "refused":
            console.note(f"checkpoint refused: {figures['problem']}")

    def _line(self, text: str) -> None:
        """Where no bar is seen, now and then a line."""
        from pmgaft import console

        if not sys.stderr.isatty() and time.monotonic() - self._said >= self._SECONDS_BETWEEN_LINES:
            console.note(text)
            self._said = time.monotonic()


def _status(figures: dict[str, Any]) -> str:
    """Loss and terms, what was answered rightly, and how fast; of the newest step."""
    terms = [f"{key.removeprefix('loss_')} {value:.3f}" for key, value in figures.items() if key.startswith("loss_")]
    shares = [
        f"{name} {100 * figures[f'{name}_accuracy']:.0f} %"
        for name in ("clean", "robust")
        if f"{name}_accuracy" in figures
    ]
    loss = f"loss {figures['loss']:.4f}" + (f" ({', '.join(terms)})" if len(terms) > 1 else "")
    return ", ".join([loss, *shares, f"{figures['images_per_second']:.1f} images/s"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


_SAME_NAMES = (
    "more than one class is called {names}: no model can tell them apart, and their images pull it both ways; "
    "rename them or give them one label"
)
_RESOLVED = "{model} on {device}{alongside}; {data}: {images} images of {classes} classes, {held_out} held out"
