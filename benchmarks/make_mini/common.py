"""What the steps share: the text space, and words for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

MEAN_SHARE = 0.7
"""Share of the mean over the ImageNet classes that is taken from every sentence embedding."""

CLASS_TEMPLATES = ("{}", "a photo of a {}.", "a photo of the {}.", "itap of a {}.", "a picture of a {}.")


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension."""
    return functional.normalize(x, dim=-1)


def class_space(work_dir: Path) -> tuple[list[str], Tensor, Tensor]:
    """Names of the ImageNet classes, their targets [1000, 384] in the text space, and the mean [384] it is free of."""
    saved = torch.load(work_dir / "imagenet.pt", weights_only=True)
    classes = unit(saved["embeddings"].mean(1))
    mean = unit(saved["embeddings"].mean(1)).mean(0)
    return saved["names"], unit(classes - MEAN_SHARE * mean), mean


def note(work_dir: Path, name: str, value: float) -> None:
    """Print a figure and keep it in W/figures.json, from where pack.py takes it into results/make_mini.json."""
    file = work_dir / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    figures[name] = round(value, 3)
    file.write_text(json.dumps(figures, indent=2) + "\n")
    print(name, figures[name], flush=True)
