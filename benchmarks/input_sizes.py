"""What each input size costs and gives: accuracy of `mini`, seconds of a probe, images a second of PMG-AFT.

python benchmarks/input_sizes.py --data-root DATA   (sets as folders below DATA; writes results/input_sizes.json)

Sizes take turns inside every round, so that all feel the same noise; times are medians over rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from record import machine

from pmgaft.attacks import Budget
from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze, frozen_copy
from pmgaft.clip.loading import Clip, load_clip
from pmgaft.clip.text import label_features
from pmgaft.data import loader, open_dataset
from pmgaft.evaluation.protocol import Protocol
from pmgaft.evaluation.run import judge, nothing_in_place
from pmgaft.objectives import PmgAft
from pmgaft.probe import ProbeSettings, probe
from pmgaft.threat import ThreatModel
from pmgaft.training.step import Learner, accumulate_gradients, frozen_view

SIZES = (96, 112, 128, 160)
SETS = ("zeroshot/cifar10", "zeroshot/caltech101", "tiny_imagenet")
THREAT = ThreatModel(norm="linf", eps=1 / 255)
BATCH = 16


def at_size(encoder: PixelEncoder, size: int) -> PixelEncoder:
    """The folded image encoder, told that its pictures are of this size."""
    whole = PixelEncoder(encoder.tower, encoder.mean.flatten().tolist(), encoder.std.flatten().tolist(), (size, size))
    return freeze(fold_batchnorm(whole)).to(memory_format=torch.channels_last)


def clean_accuracy(clip: Clip, encoder: PixelEncoder, where: Path, limit: int) -> float:
    images = open_dataset(str(where))
    texts = label_features(clip.text.encode, images.class_names, images.templates)
    batches = loader(images, replace(clip.preprocess, size=encoder.size), batch_size=32)
    parts = ((next(batches)) for _ in range(-(-min(limit, len(images)) // 32)))
    pairs = ((b.pixels.contiguous(memory_format=torch.channels_last), b.labels) for b in parts)
    return 100 * float(judge(encoder, texts, clip.logit_scale, pairs, Protocol()).right.double().mean())


def probe_seconds(encoder: PixelEncoder, pixels: torch.Tensor, texts: torch.Tensor) -> float:
    """One picture, 20 steps for each loss, never broken: eps is too small for that."""
    threat = ThreatModel(norm="linf", eps=1e-6)
    started = time.perf_counter()
    probe(encoder, 30.0, pixels[:1], [texts], [ProbeSettings(threat=threat, steps=20)])
    return time.perf_counter() - started


def training_rate(encoder: PixelEncoder, pixels: torch.Tensor, texts: torch.Tensor) -> float:
    """Images a second of one PMG-AFT step with a PGD-2 attack, the optimiser's own work left out."""
    student = nothing_in_place(frozen_copy(encoder).requires_grad_(True))
    learner = Learner(
        student=student,
        attacked=freeze(frozen_view(student)),
        guide=encoder,
        objective=PmgAft(),
        texts=texts,
        guide_texts=texts,
        scale=30.0,
    )
    labels = torch.arange(BATCH) % len(texts)
    budget = Budget(steps=2, step_size=1 / 255)
    started = time.perf_counter()
    accumulate_gradients(learner, pixels, labels, range(BATCH), threat=THREAT, budget=budget, micro_batch=BATCH)
    return BATCH / (time.perf_counter() - started)


@click.command()
@click.option("--data-root", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--limit", default=500, show_default=True, help="Images a set.")
@click.option("--rounds", default=7, show_default=True)
@click.option(
    "--output", default=Path(__file__).parent / "results" / "input_sizes.json", type=click.Path(path_type=Path)
)
def main(data_root: Path, limit: int, rounds: int, output: Path) -> None:
    clip = load_clip("mini")
    encoders = {size: at_size(clip.image, size) for size in SIZES}
    texts = torch.nn.functional.normalize(torch.randn(200, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    pixels = {size: torch.rand(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last) for size in SIZES}
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    rates: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size, encoder in encoders.items():
            seconds[size].append(probe_seconds(encoder, pixels[size], texts[:10]))
            rates[size].append(training_rate(encoder, pixels[size], texts))
    sizes = {}
    for size, encoder in encoders.items():
        accuracy = {s.rpartition("/")[2]: round(clean_accuracy(clip, encoder, data_root / s, limit), 1) for s in SETS}
        sizes[size] = {
            "clean_percent": accuracy,
            "probe_seconds": round(statistics.median(seconds[size]), 3),
            "pmg_aft_images_per_second": round(statistics.median(rates[size]), 1),
        }
        print(size, sizes[size], flush=True)
    result = {
        "images_per_set": -(-limit // 32) * 32,
        "rounds": rounds,
        "torch": torch.__version__,
        "machine": machine(),
        "sizes": sizes,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
