"""Clean and robust accuracy on held-out training images: what chooses the checkpoint that becomes the run's model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pmgaft.attacks import Budget, cross_entropy_loss, misclassified, pgd
from pmgaft.clip.image import PixelEncoder, few_sizes
from pmgaft.objectives import cosine_logits
from pmgaft.threat import ThreatModel

BUDGET = Budget(steps=10)


def right_answers(
    encoder: PixelEncoder,
    texts: Tensor,
    scale: float,
    batches: Iterable[tuple[Tensor, Tensor, Sequence[int]]],
    threat: ThreatModel,
) -> Tensor:
    """How many images are answered rightly when clean, and how many also under PGD-10: float64 [2], on the device.

    texts: unit float32 [K, D]. batches: pixels float32 [B, 3, H, W] in [0, 1], labels int64 [B], a seed for each.
    """
    encoder = few_sizes(encoder) if texts.is_cuda else encoder
    counts = torch.zeros(2, dtype=torch.float64, device=texts.device)
    for pixels, labels, seeds in batches:
        with torch.no_grad():
            right = cosine_logits(encoder.raw(pixels), texts, scale).argmax(dim=1) == labels
        rows = right.nonzero()[:, 0]
        counts[0] += len(rows)
        if len(rows):
            found = pgd(
                lambda x, _: cosine_logits(encoder.raw(x), texts, scale),
                pixels[rows],
                cross_entropy_loss(labels[rows]),
                threats=[threat] * len(rows),
                budgets=[BUDGET] * len(rows),
                seeds=[seeds[row] for row in rows.tolist()],
                success=misclassified(labels[rows]),
            )
            counts[1] += (found.finite & ~found.success).sum()
    return counts
