"""What a model answers to images, clean and attacked. Letters: B batch, K classes, n images of a set.

Clean accuracy: share of all images answered rightly. Robust accuracy: share of *all* images that are answered rightly
when clean and still are after the attack; an image answered wrongly when clean counts as not robust and is not
attacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pmgaft.attacks import Budget, cross_entropy_loss, misclassified, pgd
from pmgaft.clip.image import PixelEncoder, fold_batchnorm, freeze
from pmgaft.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How images are attacked. With attack "none", clean answers are all there is.

    Image i of a set has the attack seed `seed` + i, whatever batch it is in and however many others are judged.
    """

    attack: Literal["none", "pgd"] = "pgd"
    threat: ThreatModel
    budget: Budget
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """One entry per image, in the order judged, on the CPU.

    index: int64 [n], the image's number in its set. label, clean, adversarial: int64 [n], classes; `adversarial` is the
    answer to the image that the attack returned, computed anew from it, and equals `clean` where none was made.
    attacked, robust: bool [n]. finite: bool [n], false where the attack met NaN or infinity.
    zero_gradient_share: float32 [n].
    """

    index: Tensor
    label: Tensor
    clean: Tensor
    adversarial: Tensor
    attacked: Tensor
    robust: Tensor
    finite: Tensor
    zero_gradient_share: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Outcomes]) -> Outcomes:
        """Several batches as one."""
        parts = list(parts)
        return cls(**{name: torch.cat([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__})

    @property
    def right(self) -> Tensor:
        """Answered rightly when clean: bool [n]."""
        return torch.eq(self.clean, self.label)

    def __len__(self) -> int:
        return len(self.label)


Batches = Iterable[tuple[Tensor, Tensor]]


def judge(
    encoder: PixelEncoder,
    texts: Tensor,
    scale: float,
    batches: Batches,
    protocol: Protocol,
    *,
    indices: Sequence[int] | None = None,
    progress: Callable[[Outcomes], None] | None = None,
) -> Outcomes:
    """Answers of one encoder to one set.

    texts: unit features of the classes, float32 [K, D], K at least 2. batches: (pixels float32 [B, 3, H, W] in [0, 1],
    labels int64 [B]). indices: the images' numbers in their set, in the order of the batches; None: 0, 1, 2 and so on.
    progress is told the outcomes of each batch.
    """
    parts: list[Outcomes] = []
    done = 0
    for pixels, labels in batches:
        following = range(done, done + len(labels))
        numbers = [n if indices is None else indices[n] for n in following]
        parts.append(_judge_batch(encoder, texts, scale, pixels, labels, protocol, numbers))
        done += len(labels)
        if progress:
            progress(parts[-1])
    return Outcomes.joined(parts)


def attackable(encoder: PixelEncoder) -> PixelEncoder:
    """A frozen copy that computes the same and is quick to differentiate: folded, channels last, nothing in place."""
    return nothing_in_place(freeze(fold_batchnorm(encoder)).to(memory_format=torch.channels_last))


def nothing_in_place(encoder: PixelEncoder) -> PixelEncoder:
    """The same encoder, its activations out of place: in place they copy their input first wherever autograd is on."""
    for module in encoder.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return encoder


def _judge_batch(
    encoder: PixelEncoder,
    texts: Tensor,
    scale: float,
    pixels: Tensor,
    labels: Tensor,
    protocol: Protocol,
    numbers: Sequence[int],
) -> Outcomes:
    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        features: Tensor = encoder(x)
        return scale * features @ texts.T

    with torch.no_grad():
        clean = logits_of(pixels, labels).argmax(dim=1)
    adversarial, zeros = clean.clone(), torch.zeros(len(labels), device=pixels.device)
    finite = torch.ones_like(labels, dtype=torch.bool)
    attacked = (clean == labels) & (protocol.attack != "none")
    rows = attacked.nonzero()[:, 0]
    if len(rows):
        found = pgd(
            logits_of,
            pixels[rows],
            cross_entropy_loss(labels[rows]),
            threats=[protocol.threat] * len(rows),
            budgets=[protocol.budget] * len(rows),
            seeds=[protocol.seed + numbers[row] for row in rows.tolist()],
            success=misclassified(labels[rows]),
        )
        with torch.no_grad():
            adversarial[rows] = logits_of(found.pixels, rows).argmax(dim=1)
        finite[rows], zeros[rows] = found.finite, found.zero_gradient_share
    return Outcomes(
        index=torch.tensor(numbers),
        label=labels.cpu(),
        clean=clean.cpu(),
        adversarial=adversarial.cpu(),
        attacked=attacked.cpu(),
        robust=(attacked & (adversarial == labels)).cpu(),
        finite=finite.cpu(),
        zero_gradient_share=zeros.cpu(),
    )
