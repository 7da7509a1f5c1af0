"""The probe against the field's own tools: the smallest eps found, at what cost, and robust accuracy by its verdict.

python benchmarks/probe.py --data-root DATA [--model mini] [--images 200] [--accuracy-images 500] [--quick]

Searches the smallest eps of the same images with this project's probe, with foolbox's FMN (linf, l2) and DDN (l2), each
with its own defaults, and with pyautoattack's FAB (untargeted), against the model's own answers; gradients are counted
as images times backward passes. FAB takes a gradient for each class in each iteration: on all images it has as many
iterations as come to the 100 gradients of the others, and on the first --fab-images its own default of 100 iterations.
Then robust accuracy by the probe's verdict beside pyautoattack's APGD-CE at the same 100 steps. On a ViT-B/32 of random
weights, whose answers mean nothing, only the cost is measured.

Writes results/probe.json, what was not measured now staying as it was, and puts the figures into results/summary.json
and the tables into docs/probe.md; with --quick nothing of this. --table makes the tables anew and measures nothing.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from record import RESULTS, machine, summarise
from torch import Tensor, nn

from pmgaft.attacks.autoattack import autoattack
from pmgaft.clip.loading import Clip, load_clip
from pmgaft.clip.preprocess import read_pixels
from pmgaft.clip.text import label_features
from pmgaft.data import open_dataset
from pmgaft.evaluation.run import attackable
from pmgaft.probe import ProbeSettings, nearest_adversarial, probe
from pmgaft.threat import Norm, ThreatModel

PAGE = Path(__file__).parent.parent / "docs" / "probe.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
MODELS = ("mini", "mini-robust")
VIT = "vit-b32-random"
NORMS: tuple[Norm, ...] = ("linf", "l2")
GRADIENTS = 100
STEPS = 100
AT_ONCE = 25
"""Images searched at once, by ours and by the peers: on a CPU twice as quick as all 200."""
FAB_ITERATIONS = 100
"""FAB's default: of as many gradients each as there are classes."""
EPS = 1 / 255


class Counted(nn.Module):
    """Pixels to logits; counts forwards and gradients, one image each."""

    def __init__(self, encode: Callable[[Tensor], Tensor], texts: Tensor, scale: float) -> None:
        super().__init__()
        self.encode, self.texts, self.scale = encode, texts, scale
        self.forwards = self.gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, K]."""
        self.forwards += len(x)
        logits: Tensor = self.scale * self.encode(x) @ self.texts.T
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._count(len(x)))  # type: ignore[no-untyped-call]
        return logits

    def _count(self, images: int) -> None:
        self.gradients += images


def ours(model: Counted, pixels: Tensor, answers: Tensor, norm: Norm) -> Tensor:
    count = len(pixels)
    found = nearest_adversarial(
        lambda x, rows: model(x), pixels, answers, [norm] * count, [GRADIENTS] * count, list(range(count))
    )
    return found.pixels


def foolbox_peer(name: str) -> Callable[[Counted, Tensor, Tensor, Norm], Tensor]:
    def run(model: Counted, pixels: Tensor, answers: Tensor, norm: Norm) -> Tensor:
        import foolbox
        from foolbox.models.pytorch import PyTorchModel

        attack = getattr(foolbox.attacks, name)()
        _, found, _ = attack(PyTorchModel(model, bounds=(0, 1)), pixels, answers, epsilons=None)
        return found  # type: ignore[no-any-return]

    return run


def fab(model: Counted, pixels: Tensor, answers: Tensor, norm: Norm, iterations: int | None = None) -> Tensor:
    from pyautoattack.fab_pt import FABAttack_PT

    steps = iterations or max(1, GRADIENTS // len(model.texts))
    attack = FABAttack_PT(model, norm={"linf": "Linf", "l2": "L2"}[norm], n_iter=steps, device=pixels.device)
    return attack.perturb(pixels, answers)  # type: ignore[no-any-return]


Search = Callable[[Counted, Tensor, Tensor, Norm], Tensor]
PEERS: dict[Norm, dict[str, Search]] = {
    "linf": {"foolbox FMN": foolbox_peer("LInfFMNAttack"), "pyautoattack FAB": fab},
    "l2": {
        "foolbox FMN": foolbox_peer("L2FMNAttack"),
        "foolbox DDN": foolbox_peer("DDNAttack"),
        "pyautoattack FAB": fab,
    },
}


def judge(name: str, search: Search, model: Counted, pixels: Tensor, answers: Tensor, norm: Norm) -> dict[str, Any]:
    """One search on all images: its distances, measured again here, and what it cost an image."""
    model.forwards = model.gradients = 0
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = zip(pixels.split(AT_ONCE), answers.split(AT_ONCE), strict=True)
        found = torch.cat([search(model, *part, norm) for part in parts])
    seconds = time.perf_counter() - began
    forwards, gradients = model.forwards / len(pixels), model.gradients / len(pixels)
    with torch.no_grad():
        flipped = model(found).argmax(dim=1) != answers
    order = torch.inf if norm == "linf" else 2
    distance = torch.linalg.vector_norm((found - pixels).flatten(1), ord=order, dim=1)
    distance = torch.where(flipped, distance, torch.inf).tolist()
    entry = {
        "search": name,
        "median_eps": statistics.median(distance),
        "found": sum(flipped.tolist()),
        "gradients": round(gradients, 1),
        "forwards": round(forwards, 1),
        "seconds_an_image": round(seconds / len(pixels), 3),
    }
    click.echo(f"  {norm:5}{name:24} median eps {255 * entry['median_eps']:8.4f}/255  {entry}")
    return entry


def compare(model: Counted, pixels: Tensor, peers: bool = True, fab_images: int = 0) -> dict[str, Any]:
    """Both norms, all searches; and ours over the best peer's median. fab_images: for FAB without a bound, and ours."""
    with torch.no_grad():
        answers = model(pixels).argmax(dim=1)
    result: dict[str, Any] = {}
    for norm in NORMS:
        entries = [judge("pmgaft", ours, model, pixels, answers, norm)]
        if peers:
            entries += [judge(n, s, model, pixels, answers, norm) for n, s in PEERS[norm].items()]
        result[norm] = {"searches": entries}
        if peers:
            best = min(entry["median_eps"] for entry in entries[1:])
            result[norm]["over_best_peer"] = entries[0]["median_eps"] / best
        if fab_images:
            few, theirs = pixels[:fab_images], partial(fab, iterations=FAB_ITERATIONS)
            result[norm]["first_images"] = [
                judge(f"pmgaft, {len(few)} images", ours, model, few, answers[:fab_images], norm),
                judge(f"FAB-{FAB_ITERATIONS}, {len(few)} images", theirs, model, few, answers[:fab_images], norm),
            ]
    return result


def accuracy(model: Counted, pixels: Tensor, labels: Tensor) -> dict[str, Any]:
    """Percent of images answered rightly whose answer stands, by the probe's verdict and by APGD-CE."""
    threat = ThreatModel(eps=EPS)
    with torch.no_grad():
        right = (model(pixels).argmax(dim=1) == labels).nonzero()[:, 0]
    settings = ProbeSettings(threat=threat, steps=STEPS, algorithm="apgd")
    broken = 0
    for rows in right.split(32):
        reports = probe(model.encode, model.scale, pixels[rows], [model.texts] * len(rows), [settings] * len(rows))
        broken += sum(report.verdict == "broken" for report in reports)
    theirs = autoattack(model, pixels[right], labels[right], threat, attacks=["apgd-ce"], batch_size=32)
    stands = {"probe": len(right) - broken, "apgd-ce": int((~theirs.success).sum())}
    percent = {name: 100 * count / len(pixels) for name, count in stands.items()}
    click.echo(f"  clean {100 * len(right) / len(pixels):.1f} %, standing at eps 1/255: {percent}")
    return {"images": len(pixels), "clean": 100 * len(right) / len(pixels), "standing": percent}


def read(clip: Clip, where: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """pixels [n, 3, H, W], labels [n], text features [K, D] of the first images of a set."""
    images = open_dataset(str(where), "test")
    rows = [images.read(number) for number in range(min(count, len(images)))]
    pixels = torch.stack([read_pixels(encoded, clip.preprocess) for encoded, _ in rows])
    return pixels, torch.tensor([label for _, label in rows]), label_features(clip.text.encode, images.class_names)


def random_vit() -> tuple[Counted, Tensor]:
    """A ViT-B/32 of random weights, and random pictures: what a gradient costs does not depend on either."""
    import open_clip

    from pmgaft.clip.image import PixelEncoder, freeze

    generator = torch.Generator().manual_seed(0)
    tower = open_clip.create_model("ViT-B-32", load_weights=False).visual
    encode = freeze(PixelEncoder(tower, (0.5,) * 3, (0.5,) * 3, (224, 224)))
    texts = nn.functional.normalize(torch.randn(10, 512, generator=generator), dim=1)
    return Counted(encode, texts, 100.0), torch.rand(30, 3, 224, 224, generator=generator)


@click.command()
@click.option("--data-root", type=click.Path(exists=True, path_type=Path))
@click.option("--dataset", default="zeroshot/cifar10", show_default=True, help="Under the root.")
@click.option("--model", "names", multiple=True, type=click.Choice((*MODELS, VIT)), help="[default: all]")
@click.option("--images", default=200, show_default=True)
@click.option("--accuracy-images", default=500, show_default=True)
@click.option("--fab-images", default=10, show_default=True)
@click.option("--quick", is_flag=True, help="4 images, 8 for accuracy; figures go to the terminal alone.")
@click.option("--table", "only_table", is_flag=True, help="Only write docs/probe.md's tables anew.")
def main(
    data_root: Path | None,
    dataset: str,
    names: tuple[str, ...],
    images: int,
    accuracy_images: int,
    fab_images: int,
    quick: bool,
    only_table: bool,
) -> None:
    file = RESULTS / "probe.json"
    if only_table:
        write_tables(json.loads(file.read_text()))
        return
    if data_root is None:
        raise click.UsageError("--data-root is missing")
    warnings.filterwarnings("ignore", module="foolbox|pyautoattack|eagerpy")
    if quick:
        names, images, accuracy_images, fab_images = names or MODELS, 4, 8, 1
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not quick else {}
    for name in names or (*MODELS, VIT):
        click.echo(name)
        if name == VIT:
            model, pixels = random_vit()
            found = {"min_eps": compare(model, pixels, peers=False)}
        else:
            clip = load_clip(name)
            pixels, labels, texts = read(clip, data_root / dataset, max(images, accuracy_images))
            model = Counted(attackable(clip.image), texts, clip.logit_scale).eval()
            found = {
                "min_eps": compare(model, pixels[:images], fab_images=fab_images),
                "accuracy": accuracy(model, pixels[:accuracy_images], labels[:accuracy_images]),
            }
        count = min(images, len(pixels))
        result[name] = {"machine": machine(), "dataset": dataset, "images": count} | found
        if not quick:
            file.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(summed_up := figures(result), indent=1))
    if not quick:
        summarise(summed_up)
        write_tables(result)


def write_tables(result: dict[str, Any]) -> None:
    """Into docs/probe.md, between its markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has no markers"
    PAGE.write_text(before + BEGIN + tables(result) + END + after, encoding="utf-8")


def tables(result: dict[str, Any]) -> str:
    lines = [
        "| model, norm | images | search | smallest eps, median | found | gradients | forwards |",
        "|---" * 7 + "|",
    ]
    for name, found in result.items():
        for norm in NORMS:
            entries = [(found["images"], entry) for entry in found["min_eps"][norm]["searches"]]
            for entry in found["min_eps"][norm].get("first_images", []):
                search, _, count = entry["search"].rpartition(", ")
                entries.append((int(count.split()[0]), entry | {"search": search}))
            for images, entry in entries:
                eps = entry["median_eps"]
                shown = "-" if name == VIT else f"{255 * eps:.4f}/255" if norm == "linf" else f"{eps:.4f}"
                cells = [f"{name}, {norm}", images, entry["search"], shown, entry["found"]]
                cells += [entry["gradients"], entry["forwards"]]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| model | images | clean | stands by the probe's verdict | by APGD-CE |", "|---" * 5 + "|"]
    for name in MODELS:
        if name in result:
            one = result[name]["accuracy"]
            percent = [one["clean"], one["standing"]["probe"], one["standing"]["apgd-ce"]]
            lines.append(f"| {name} | {one['images']} | " + " | ".join(f"{value:.1f} %" for value in percent) + " |")
    return "\n".join(lines) + "\n"


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The worst of both models; nothing until both were measured."""
    if not set(MODELS) <= result.keys():
        return {}
    searches = [result[name]["min_eps"][norm] for name in MODELS for norm in NORMS]
    standing = [result[name]["accuracy"]["standing"] for name in MODELS]
    return {
        "probe.min_eps_over_best_peer": max(one["over_best_peer"] for one in searches),
        "probe.accuracy_minus_apgd_ce_points": max(one["probe"] - one["apgd-ce"] for one in standing),
        "probe.min_eps_gradients": max(one["searches"][0]["gradients"] for one in searches),
    }


if __name__ == "__main__":
    main()
