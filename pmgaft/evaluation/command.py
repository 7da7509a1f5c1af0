"""`pmgaft evaluate`. Everything heavy is imported when the command runs, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pmgaft.errors import InputError

if TYPE_CHECKING:
    from pmgaft.clip.loading import Clip
    from pmgaft.data import ImageSet
    from pmgaft.evaluation.report import SetResult
    from pmgaft.evaluation.run import Protocol

_BATCH = 32


@click.command()
@click.argument("model")
@click.option("--pretrained", help="Tag or file of weights, where the model's name needs one.")
@click.option("--dataset", "datasets", multiple=True, required=True, help="A name or a path. Repeatable.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where named sets lie; else PMGAFT_DATA.")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@click.option("--attack", type=click.Choice(["pgd", "none"]), default="pgd", show_default=True)
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--eps", default="1/255", show_default=True, help="Radius in pixel units; write 4/255 for 4/255.")
@click.option("--steps", default=10, show_default=True, help="Gradients per restart.")
@click.option("--step-size", help="In pixel units; left out: 2.5 eps / steps.")
@click.option("--restarts", default=1, show_default=True)
@click.option("--template", "templates", multiple=True, help='Such as "a photo of a {}."; else the set\'s. Repeatable.')
@click.option("--limit", type=click.IntRange(min=1), help="Judge at most so many images a set, drawn with the seed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Threads that decode images.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="The result, a .json file.")
@click.option("--force", is_flag=True, help="Overwrite an existing result.")
def evaluate(
    model: str,
    pretrained: str | None,
    datasets: tuple[str, ...],
    data_root: Path | None,
    split: Literal["test", "train"],
    attack: Literal["none", "pgd"],
    norm: Literal["linf", "l2"],
    eps: str,
    steps: int,
    step_size: str | None,
    restarts: int,
    templates: tuple[str, ...],
    limit: int | None,
    seed: int,
    workers: int,
    device: str,
    output: Path | None,
    force: bool,
) -> None:
    """Measure clean and robust accuracy on data sets.

    MODEL is a shipped model, a run of pmgaft train, or anything else that pmgaft train takes as model. The attack acts
    on the pixels that enter the model; images answered wrongly when clean count as not robust and are not attacked.
    Writes the result, and beside it a .parquet file with one row per image.

    \b
    Example:
      pmgaft evaluate mini-robust --dataset data/cifar10 --dataset data/caltech101 --eps 1/255 --limit 500
    """
    import torch

    from pmgaft import console
    from pmgaft.attacks import Budget
    from pmgaft.clip.loading import load_clip, tensors_hash
    from pmgaft.data import open_dataset
    from pmgaft.device import pick_device
    from pmgaft.evaluation.report import result_json, table_rows, write_result
    from pmgaft.evaluation.run import Protocol
    from pmgaft.threat import ThreatModel, parse_eps

    protocol = Protocol(
        attack=attack,
        threat=ThreatModel(norm=norm, eps=parse_eps(eps, norm)),
        budget=Budget(
            steps=steps, restarts=restarts, step_size=None if step_size is None else parse_eps(step_size, norm)
        ),
        seed=seed,
    )
    output = output or Path(f"evaluation-{Path(model).name}.json")
    if output.suffix != ".json":
        raise InputError(f"--output names a .json file, not {output}")
    if output.exists() and not force:
        raise InputError(f"{output} exists; name another --output, or overwrite it with --force")
    where = pick_device(device)
    torch.backends.cudnn.allow_tf32 = False  # TF32 moves logits by more than an attack's last steps do
    with console.step(f"reading model {model} and the data"):
        clip = load_clip(model, pretrained, where)
        sets = [open_dataset(name, split, data_root) for name in datasets]
    console.note(
        f"{clip.name} on {where}; " + (f"PGD-{steps}, {protocol.threat}" if attack != "none" else "clean only")
    )
    results = [_one(clip, images, split, protocol, templates, limit, workers, where) for images in sets]
    facts = {"name": clip.name, "pretrained": pretrained, "hash": tensors_hash(clip.open_clip_model)}
    outcomes = output.with_suffix(".parquet")
    write_result(output, result_json(facts, protocol, results, str(where), outcomes.name), results)
    console.print_table(*table_rows(results, protocol))
    for entry in results:
        for warning in entry.warnings() if attack != "none" else []:
            console.note(f"warning: {entry.name}: {warning}")
    console.note(f"result {output}, one row per image in {outcomes}")


def _one(
    clip: Clip,
    images: ImageSet,
    split: str,
    protocol: Protocol,
    templates: tuple[str, ...],
    limit: int | None,
    workers: int,
    device: Any,
) -> SetResult:
    """Judge one set, with a bar."""
    import math
    import time
    from itertools import islice

    import torch

    from pmgaft import console
    from pmgaft.clip.text import label_features
    from pmgaft.data import loader
    from pmgaft.data.subset import Subset
    from pmgaft.evaluation.report import SetResult
    from pmgaft.evaluation.run import Outcomes, attackable, judge

    if len(images.class_names) < 2:
        raise InputError(f"{images.name} has fewer than two classes; there is nothing to tell apart")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(protocol.seed)).tolist()
    chosen = Subset(images, sorted(order[:limit]))
    used = templates or images.templates
    began = time.monotonic()
    texts = label_features(clip.text.encode, images.class_names, used)
    batches = islice(
        loader(chosen, clip.preprocess, batch_size=_BATCH, workers=workers), math.ceil(len(chosen) / _BATCH)
    )
    moved = ((b.pixels.to(device, memory_format=torch.channels_last), b.labels.to(device)) for b in batches)
    right = robust = done = 0
    with console.progress(images.name, len(chosen)) as advance:

        def show(part: Outcomes) -> None:
            nonlocal right, robust, done
            done, right, robust = done + len(part), right + int(part.right.sum()), robust + int(part.robust.sum())
            shown = f"clean {100 * right / done:.1f} %"
            advance(len(part), shown + (f", robust {100 * robust / done:.1f} %" if protocol.attack != "none" else ""))

        outcomes = judge(
            attackable(clip.image),
            texts,
            clip.logit_scale,
            moved,
            protocol,
            indices=chosen.indices,
            progress=show,
        )
    return SetResult(
        name=images.name,
        split=split,
        hash=images.hash,
        classes=images.class_names,
        templates=used,
        outcomes=outcomes,
        seconds=time.monotonic() - began,
    )
