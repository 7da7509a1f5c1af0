"""What `pmgaft evaluate` and `pmgaft blend` ask alike: the options, and what becomes of them. Light to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

if TYPE_CHECKING:
    from pmgaft.data import ImageSet, Prompts
    from pmgaft.evaluation.session import Bar, Settings
    from pmgaft.ranks import Ranks

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--dataset", "datasets", multiple=True, help="A name or a path. Repeatable."),
    click.option("--data-root", type=click.Path(path_type=Path), help="Where named sets lie; else PMGAFT_DATA."),
    click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True),
    click.option(
        "--attack",
        "attacks",
        multiple=True,
        metavar="NAME[:STEPS[xRESTARTS]]",
        help="Repeatable; each attack sees what the earlier ones left. pgd[-ce], pgd-margin, apgd-ce, apgd-margin, "
        "apgd-dlr, apgd-t, square, autoattack, or none.  [default: apgd-ce and apgd-margin]",
    ),
    click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True),
    click.option("--eps", default="1/255", show_default=True, help="Radii in pixel units, such as 0,1/255,2/255."),
    click.option("--grid", type=click.Choice(["model-input", "native"]), default="model-input", show_default=True),
    click.option("--steps", type=click.IntRange(min=1), help="Of every attack.  [default: 10 pgd, 50 apgd]"),
    click.option("--step-size", help="Of pgd, in pixel units.  [default: 2.5 eps / steps]"),
    click.option("--restarts", type=click.IntRange(min=1), help="Of every attack.  [default: 1]"),
    click.option("--each-alone", is_flag=True, help="Run every attack on every image, for figures of its own."),
    click.option(
        "--prompts",
        type=click.Choice(["plain", "paper", "clip"]),
        default="plain",
        show_default=True,
        help="Whose class names and templates known sets get: one sentence, PMG-AFT's, or CLIP-benchmark's.",
    ),
    click.option(
        "--template",
        "templates",
        multiple=True,
        help='Such as "a photo of a {}.", or a list: imagenet, simple. Repeatable.  [default: each set\'s own]',
    ),
    click.option("--limit", type=click.IntRange(min=1), help="At most so many images a set, drawn with the seed."),
    click.option("--seed", default=0, show_default=True),
    click.option("--check-images", type=click.IntRange(min=0), help="Images a set for the self-checks' attacks."),
    click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
    click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Decoding threads."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--resume", is_flag=True, help="Go on with what a killed evaluation has finished."),
    click.option("--force", is_flag=True, help="Overwrite an existing result."),
)


def evaluation_options(command: Command) -> Command:
    """Put the options on a command; it takes them as keywords and makes `Asked` of them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options as the command line gave them."""

    datasets: tuple[str, ...]
    data_root: Path | None
    split: Literal["test", "train"]
    attacks: tuple[str, ...]
    norm: Literal["linf", "l2"]
    eps: str
    grid: Literal["model-input", "native"]
    steps: int | None
    step_size: str | None
    restarts: int | None
    each_alone: bool
    prompts: Prompts
    templates: tuple[str, ...]
    limit: int | None
    seed: int
    check_images: int | None
    batch_size: int
    workers: int
    device: str
    resume: bool
    force: bool

    def settings(self) -> Settings:
        """Raises: ThreatError, LabelsError for what makes no sense."""
        from pmgaft.evaluation.classes import chosen_templates
        from pmgaft.evaluation.protocol import DEFAULT_ATTACKS, Protocol, parse_attacks, parse_threats
        from pmgaft.evaluation.session import Settings
        from pmgaft.threat import parse_eps

        attacks = parse_attacks(
            self.attacks or DEFAULT_ATTACKS,
            steps=self.steps,
            restarts=self.restarts,
            step_size=None if self.step_size is None else parse_eps(self.step_size, self.norm),
        )
        protocol = Protocol(
            attacks=attacks,
            threats=parse_threats(self.eps if attacks else "0", self.norm, self.grid),
            seed=self.seed,
            each_alone=self.each_alone,
        )
        return Settings(
            protocol=protocol,
            split=self.split,
            templates=chosen_templates(self.templates) if self.templates else None,
            limit=self.limit,
            batch_size=self.batch_size,
            workers=self.workers,
            check_images=self.check_images,
        )

    def sets(self) -> list[ImageSet]:
        """Raises: DataError for a set that is not there."""
        from pmgaft.data import open_dataset

        return [open_dataset(name, self.split, self.data_root, self.prompts) for name in self.datasets]


def bar_for(ranks: Ranks) -> Bar:
    """A bar for a person at the first rank; the others work in silence."""
    from pmgaft import console

    return console.progress if ranks.first else lambda what, total: nullcontext(lambda by, status="": None)


def show(result: Mapping[str, Any], output: Path) -> None:
    """A result on the terminal: figures, self-checks, and in words whatever makes them doubtful."""
    from pmgaft import console
    from pmgaft.evaluation.report import accuracy_table, attacks_table, checks_table

    console.print_table(*accuracy_table(result), title="clean, and robust at each eps")
    if len(result["protocol"]["attacks"]) > 1:
        console.print_table(*attacks_table(result), title="what each attack leaves")
    console.print_table(*checks_table(result))
    for entry in result["sets"]:
        for group in entry["merged_classes"]:
            names = ", ".join(f"{c['name']} ({c['label']})" for c in group)
            console.note(f"{entry['name']}: judged as one class, since the model cannot tell them apart: {names}")
        for check in entry["checks"]:
            if check["passed"] is False:
                console.note(f"warning: {entry['name']}: self-check {check['name']} failed: {check['said']}")
    if not result["checks"]["passed"]:
        console.note("warning: the attack, the model or the data is not what it seems; do not quote the marked figures")
    console.note(f"result {output}, the same for people in {output.with_suffix('.md')}, rows in {result['outcomes']}")
