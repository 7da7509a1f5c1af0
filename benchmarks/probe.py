"""The probe against the field's own tools: the smallest eps found, at what cost, and robust accuracy by its verdict.

python benchmarks/probe.py --data-root DATA [--images 200] [--accuracy-images 500] [--quick] [--no-vit]

Searches the smallest eps of the same images with this project's probe, with foolbox's FMN (linf, l2) and DDN (l2) and
with pyautoattack's FAB (untargeted), each with its own defaults, against the model's own answers; gradients are counted
as images times backward passes. Then robust accuracy by the probe's verdict beside pyautoattack's APGD-CE at the same
100 steps. Writes results/probe.json, and puts the figures into results/summary.json unless --quick.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from pmgaft.attacks.autoattack import autoattack
from pmgaft.clip.loading import Clip, load_clip
from pmgaft.clip.preprocess import read_pixels
from pmgaft.clip.text import label_features
from pmgaft.data import open_dataset
from pmgaft.evaluation.run import attackable
from pmgaft.probe import ProbeSettings, nearest_adversarial, probe
from pmgaft.threat import Norm, ThreatModel

RESULTS = Path(__file__).parent / "results"
MODELS = ("mini", "mini-robust")
NORMS: tuple[Norm, ...] = ("linf", "l2")
GRADIENTS = 100
STEPS = 100
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


def fab(model: Counted, pixels: Tensor, answers: Tensor, norm: Norm) -> Tensor:
    from pyautoattack.fab_pt import FABAttack_PT

    attack = FABAttack_PT(model, norm={"linf": "Linf", "l2": "L2"}[norm], n_iter=100, device=pixels.device)
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
        found = search(model, pixels, answers, norm)
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
    click.echo(f"  {norm:5}{name:18} median eps {255 * entry['median_eps']:8.4f}/255  {entry}")
    return entry


def compare(model: Counted, pixels: Tensor, peers: bool = True) -> dict[str, Any]:
    """Both norms, all searches; and ours over the best peer's median."""
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
@click.option("--data-root", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--dataset", default="zeroshot/cifar10", show_default=True, help="Under the root.")
@click.option("--images", default=200, show_default=True)
@click.option("--accuracy-images", default=500, show_default=True)
@click.option("--quick", is_flag=True, help="4 images, 8 for accuracy, without FAB; figures go to the terminal alone.")
@click.option("--vit/--no-vit", default=True, show_default=True, help="Cost on a ViT-B/32 of random weights.")
def main(data_root: Path, dataset: str, images: int, accuracy_images: int, quick: bool, vit: bool) -> None:
    warnings.filterwarnings("ignore", module="foolbox|pyautoattack|eagerpy")
    if quick:
        images, accuracy_images, vit = 4, 8, False
        for peers in PEERS.values():
            del peers["pyautoattack FAB"]
    result: dict[str, Any] = {"machine": platform.processor(), "threads": torch.get_num_threads(), "dataset": dataset}
    for name in MODELS:
        click.echo(name)
        clip = load_clip(name)
        pixels, labels, texts = read(clip, data_root / dataset, max(images, accuracy_images))
        model = Counted(attackable(clip.image), texts, clip.logit_scale).eval()
        result[name] = {
            "min_eps": compare(model, pixels[:images]),
            "accuracy": accuracy(model, pixels[:accuracy_images], labels[:accuracy_images]),
        }
    if vit:
        click.echo("ViT-B/32, random weights")
        result["vit_b32_random"] = {"min_eps": compare(*random_vit(), peers=False)}
    figures = {
        "probe.min_eps_over_best_peer": max(result[m]["min_eps"][n]["over_best_peer"] for m in MODELS for n in NORMS),
        "probe.accuracy_minus_apgd_ce_points": max(
            result[m]["accuracy"]["standing"]["probe"] - result[m]["accuracy"]["standing"]["apgd-ce"] for m in MODELS
        ),
        "probe.min_eps_gradients": max(
            result[m]["min_eps"][n]["searches"][0]["gradients"] for m in MODELS for n in NORMS
        ),
    }
    click.echo(json.dumps(figures, indent=1))
    if quick:
        return
    (RESULTS / "probe.json").write_text(json.dumps(result | figures, indent=1) + "\n")
    summary = RESULTS / "summary.json"
    known = json.loads(summary.read_text()) if summary.exists() else {}
    summary.write_text(
        json.dumps(dict(sorted((known | {k: round(v, 4) for k, v in figures.items()}).items())), indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
