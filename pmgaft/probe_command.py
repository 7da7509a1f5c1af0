"""`pmgaft probe`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pmgaft.gate import exit_code, fail_on_option

if TYPE_CHECKING:
    import torch

    from pmgaft.probe.full import Model, Question
    from pmgaft.probe.output import Report


@click.command()
@click.argument("pictures", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write index.html, tables, drawings and junit.xml into this new folder.",
)
@fail_on_option
@click.option("--labels", help="What the picture may show, separated by commas.")
@click.option("--label-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A label a line.")
@click.option(
    "--template", "templates", multiple=True, help='Such as "a photo of a {}.", or imagenet, simple. Repeatable.'
)
@click.option("--model", default="mini-robust", show_default=True, help="As for pmgaft evaluate.")
@click.option("--pretrained", help="Tag or file of weights, where the model's name needs one.")
@click.option("--eps", default="1/255", show_default=True, help="Radius, pixels lying in [0, 1].")
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--attack", type=click.Choice(["pgd", "apgd"]), help="[default: apgd from 50 steps on, else pgd]")
@click.option(
    "--loss", "losses", multiple=True, type=click.Choice(["ce", "margin", "dlr"]), help="[default: ce and margin]"
)
@click.option("--steps", type=click.IntRange(min=1), default=50, show_default=True, help="Of each loss and restart.")
@click.option("--restarts", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--step-size", help="[default: 2.5 eps / steps for pgd, 2 eps at first for apgd]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0), help="For the attacks; without an end, inconclusive.")
@click.option("--target", help="The label that the answer must become.  [default: any other]")
@click.option("--group", "groups", multiple=True, help="Labels that count as one answer: car,automobile. Repeatable.")
@click.option("--min-eps/--no-min-eps", default=True, show_default=True, help="Search the smallest eps.")
@click.option("--targets", type=click.IntRange(min=0), default=0, help="Also search it for so many other labels.")
@click.option(
    "--gradients", type=click.IntRange(min=2), default=100, show_default=True, help="At most, of each search."
)
@click.option("--health/--no-health", default=True, show_default=True, help="Check the attack itself.")
@click.option(
    "--square", type=click.IntRange(min=0), default=100, show_default=True, help="With --health: queries of Square."
)
@click.option(
    "--wording",
    type=click.Choice(["none", "simple", "imagenet"]),
    default="simple",
    show_default=True,
    help="Other templates to try.",
)
@click.option("--synonym", "synonyms", multiple=True, help="Another name of the answer, to try. Repeatable.")
@click.option(
    "--certify", type=float, metavar="SIGMA", help="An l2 certificate under noise of this deviation, such as 0.1."
)
@click.option("--draws", type=click.IntRange(min=1), default=1000, show_default=True, help="With --certify.")
@click.option("--save-adversarial", type=click.Path(dir_okay=False, path_type=Path), help="A PNG of the image found.")
@click.option(
    "--save-difference", type=click.Path(dir_okay=False, path_type=Path), help="A PNG of the change, amplified."
)
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Pictures at once.  [default: 8 on a CPU, 32 on a GPU]")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def probe(
    pictures: Path,
    output: Path | None,
    fail_on: tuple[str, ...],
    batch_size: int | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Report how easily the answer to a picture, or to each picture of a folder, is broken, without a server.

    The model's own answer is attacked within a stated threat model. "broken" means that an image inside it was found
    that is answered otherwise; "not broken", that this attack found none, and nothing beyond that.

    Of a folder, with --output, sub-folders that are named as the labels are taken as true labels. A file that cannot be
    read is reported, and for --fail-on counts as inconclusive.

    \b
    Exit codes: 0 probed; 2 something asked for makes no sense, or not one picture could be read;
    3 an answer broke (with --fail-on broken); 4 nothing can be said of one (with --fail-on inconclusive).

    \b
    Example:
      pmgaft probe cat.jpg --labels cat,dog,toaster
      pmgaft probe car.jpg --labels car,automobile,truck --group car,automobile --eps 2/255 --targets 2 --json
      pmgaft probe photos/ --labels cat,dog,toaster --output report/ --fail-on broken
    """
    from pmgaft import console
    from pmgaft.device import float32_products, pick_device
    from pmgaft.probe.folder import picture_files
    from pmgaft.probe.output import Report

    many = pictures.is_dir()
    if many and output is None:
        raise click.UsageError("say where a folder's report is to go: --output report/")
    if many and (options["save_adversarial"] or options["save_difference"]):
        raise click.UsageError(
            "--save-adversarial and --save-difference are for one picture; see --output for a folder"
        )
    question = _question(options)
    files = picture_files(pictures) if many else [pictures]
    report = None if output is None else Report(output, question)
    device = pick_device(options["device"])
    with float32_products(tf32=False):
        with console.step(f"loading {options['model']}"):
            model = _model(options["model"], options["pretrained"], device)
        if report is not None and many:
            size = batch_size or (32 if device.type == "cuda" else 8)
            return _probe_folder(report, model, pictures, files, device, size, fail_on, as_json)
        with console.step(f"probing {pictures.name} on {device}"):
            return _probe_one(report, model, pictures, question, device, fail_on, as_json)


def _probe_one(
    report: Report | None,
    model: Model,
    picture: Path,
    question: Question,
    device: torch.device,
    fail_on: Collection[str],
    as_json: bool,
) -> int:
    from pmgaft.probe.folder import Row, shown_name
    from pmgaft.probe.full import examine, read_picture
    from pmgaft.probe.show import show

    (finding,) = examine(model, [read_picture(picture.read_bytes(), model)], question, device)
    found = finding.document
    if report is not None:
        report.add(Row(file=shown_name(Path(picture.name)), document=found, seconds=found["seconds"]), finding)
        report.write(shown_name(picture), found["model"], 1, fail_on)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        show(found)
    return _exit_code([found["verdict"]], fail_on)


def _probe_folder(
    report: Report,
    model: Model,
    folder: Path,
    files: Sequence[Path],
    device: torch.device,
    batch_size: int,
    fail_on: Collection[str],
    as_json: bool,
) -> int:
    """Stopped by Ctrl-C, what is finished is written, too."""
    from pmgaft import console
    from pmgaft.probe.folder import probe_files, shown_name
    from pmgaft.probe.show import show_folder

    console.note(f"probing {len(files)} pictures on {device}")
    stopped, broken = False, 0
    with console.progress("probing", len(files), "pictures") as advance:
        rows = probe_files(model, folder, files, report.question, device, batch_size=batch_size)
        try:
            for row, finding in rows:
                report.add(row, finding)
                broken += row.verdict == "broken"
                advance(1, f"{broken} broken")
        except KeyboardInterrupt:
            stopped = True
    document = report.write(shown_name(folder), {"name": model.name, "hash": model.hash}, len(files), fail_on)
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        show_folder(document, report.folder)
    if stopped:
        raise KeyboardInterrupt
    return _exit_code([row.verdict for row in report.rows], fail_on)


def _exit_code(verdicts: Sequence[str], fail_on: Collection[str]) -> int:
    """Nothing read at all is a mistake; else as --fail-on says."""
    return 2 if all(verdict == "error" for verdict in verdicts) else exit_code(verdicts, fail_on)


def _question(options: dict[str, Any]) -> Question:
    """Raises: ThreatError, LabelsError for what makes no sense."""
    from pmgaft.clip.ensembles import named_templates
    from pmgaft.clip.text import DEFAULT_TEMPLATES
    from pmgaft.evaluation.classes import chosen_templates
    from pmgaft.probe.full import Question, groups_of, position_of
    from pmgaft.probe.settings import ProbeSettings
    from pmgaft.threat import ThreatModel, parse_eps

    labels = _labels(options["labels"], options["label_file"])
    target, norm = options["target"], options["norm"]
    settings = ProbeSettings(
        threat=ThreatModel(norm=norm, eps=parse_eps(options["eps"], norm)),
        steps=options["steps"],
        restarts=options["restarts"],
        step_size=None if options["step_size"] is None else parse_eps(options["step_size"], norm),
        seed=options["seed"],
        seconds=options["seconds"],
        algorithm=options["attack"],
        losses=options["losses"] or ("ce", "margin"),
        target=None if target is None else position_of(target, labels, "target"),
        groups=groups_of([_split(group) for group in options["groups"]], labels),
        min_eps=options["min_eps"],
        targets=options["targets"],
        search_gradients=options["gradients"],
        health=options["health"],
        square_queries=options["square"] if options["health"] else 0,
    )
    return Question(
        labels=labels,
        templates=chosen_templates(options["templates"]) if options["templates"] else DEFAULT_TEMPLATES,
        settings=settings,
        top_k=options["top_k"],
        wordings=() if options["wording"] == "none" else named_templates(options["wording"]),
        synonyms=options["synonyms"],
        sigma=options["certify"],
        draws=options["draws"],
        adversarial=options["save_adversarial"],
        difference=options["save_difference"],
    )


def _labels(text: str | None, file: Path | None) -> tuple[str, ...]:
    from pmgaft.clip.text import check_labels

    if (text is None) == (file is None):
        raise click.UsageError("say what the picture may show: --labels cat,dog,toaster or --label-file FILE")
    if file is not None:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        found = _split(text or "")
    check_labels(found, most=10_000, longest=300)
    return tuple(found)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _model(name: str, pretrained: str | None, device: torch.device) -> Model:
    from pmgaft.clip.loading import load_clip, tensors_hash
    from pmgaft.evaluation.run import attackable
    from pmgaft.probe.full import Model

    clip = load_clip(name, pretrained, device)

    encoded = lru_cache(maxsize=16)(clip.text.encode)  # the same labels and wordings for every picture of a folder

    def text(texts: Sequence[str]) -> torch.Tensor:
        return encoded(tuple(texts))

    return Model(
        encode=attackable(clip.image),
        text=text,
        logit_scale=clip.logit_scale,
        preprocess=clip.preprocess,
        name=name,
        hash=tensors_hash(clip.open_clip_model),
    )
