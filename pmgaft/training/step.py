"""One optimiser step: attack, encodings, loss, gradients. Nothing here knows of files, epochs or schedules.

Letters: B batch, n part of a batch, K training classes, G guide texts, D features.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmgaft.attacks import Budget, cross_entropy_loss, pgd
from pmgaft.clip.image import PixelEncoder
from pmgaft.objectives import Encoding, Objective, Targets, cosine_logits, weighted
from pmgaft.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Who learns, from whom, and towards what.

    student: being trained, in eval mode throughout, so that what is attacked, updated and served is one function and
    BatchNorm keeps the original's statistics. attacked: a frozen view of the student's own weights (`frozen_view`), so
    that no attack can touch a parameter's gradient. guide: the frozen original. texts: unit float32 [K, D] of the
    training classes; guide_texts: [G, D]. scale: the logit scale.
    """

    student: PixelEncoder
    attacked: PixelEncoder
    guide: PixelEncoder
    objective: Objective
    texts: Tensor
    guide_texts: Tensor
    scale: float

    def targets(self, labels: Tensor) -> Targets:
        """What these images are compared with. labels: int64 [n]."""
        return Targets(labels=labels, texts=self.texts, guide_texts=self.guide_texts, scale=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one step saw: the loss, each term unweighted, and the mean share of zero gradient entries in the attack."""

    loss: float
    terms: dict[str, float]
    zero_gradient_share: float


def frozen_view(encoder: PixelEncoder) -> PixelEncoder:
    """The same weights in the same memory, as a module without parameter gradients: it follows every update in
    place."""
    view = copy.deepcopy(encoder)
    for name, parameter in encoder.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(view.get_submodule(owner), last, nn.Parameter(parameter.detach(), requires_grad=False))
    return view


def accumulate_gradients(
    learner: Learner,
    pixels: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    *,
    threat: ThreatModel,
    budget: Budget,
    micro_batch: int,
) -> Measured:
    """Add the gradient of the batch's loss to the student's parameters.

    pixels: float32 [B, 3, H, W] in [0, 1]. labels: int64 [B]. seeds: one per image, for the attack's random start.
    Costs, in image-encoder passes over the batch: `budget.steps` forwards with input gradient, one forward and backward
    of the student over [x_adv; x] as one batch, one forward of the guide; less where the objective reads less. The
    batch is worked off in parts of `micro_batch`, which changes speed and memory and not the result.
    """
    batch = len(pixels)
    measured: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, batch, micro_batch):
        part = slice(start, start + micro_batch)
        adversarial, zero_share = _attack(learner, pixels[part], labels[part], seeds[part], threat, budget)
        encodings = _encode(learner, pixels[part], adversarial)
        terms = learner.objective.terms(encodings, learner.targets(labels[part]))
        loss = weighted(terms, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        measured["loss"].append(loss.detach())
        measured["zero_gradient_share"].append(zero_share.sum() / batch)
        for name, term in terms.items():
            measured[name].append(term.over(batch).detach())
    sums = {name: float(torch.stack(values).sum()) for name, values in measured.items()}
    return Measured(loss=sums.pop("loss"), zero_gradient_share=sums.pop("zero_gradient_share"), terms=sums)


def _attack(
    learner: Learner, pixels: Tensor, labels: Tensor, seeds: Sequence[int], threat: ThreatModel, budget: Budget
) -> tuple[Tensor, Tensor]:
    """Adversarial images [n, 3, H, W] against the student's cross entropy, and their zero gradient shares [n]."""
    if not learner.objective.reads & {"student_adv", "guide_adv"}:
        return pixels, torch.zeros(len(pixels))
    found = pgd(
        lambda x, rows: cosine_logits(learner.attacked.raw(x), learner.texts, learner.scale),
        pixels,
        cross_entropy_loss(labels),
        threats=[threat] * len(pixels),
        budgets=[budget] * len(pixels),
        seeds=seeds,
        keep="last",
    )
    return found.pixels, found.zero_gradient_share


def _encode(learner: Learner, pixels: Tensor, adversarial: Tensor) -> dict[Encoding, Tensor]:
    """What the objective reads and nothing else; student and guide run once each, over one batch."""
    images = {"adv": adversarial, "clean": pixels}
    encodings: dict[Encoding, Tensor] = {}
    sides: list[tuple[PixelEncoder, tuple[Encoding, Encoding]]] = [
        (learner.student, ("student_adv", "student_clean")),
        (learner.guide, ("guide_adv", "guide_clean")),
    ]
    for encoder, names in sides:
        read = [name for name in names if name in learner.objective.reads]
        if read:
            with torch.set_grad_enabled(encoder is learner.student):
                features = encoder.raw(torch.cat([images[name.partition("_")[2]] for name in read]))
            encodings.update(zip(read, features.chunk(len(read)), strict=True))
    return encodings
