"""One optimiser step: attack, encodings, loss, gradients. Nothing here knows of files, epochs or schedules.

Letters: B batch, n part of a batch, K training classes, G guide texts, D features.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pmgaft.attacks import Budget, pgd
from pmgaft.clip.image import PixelEncoder
from pmgaft.objectives import Encoding, Objective, Targets, weighted
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
        targets = learner.targets(labels[part])
        encodings = _encode("guide", learner, {"clean": pixels[part]})
        adversarial, zero_share = _attack(learner, pixels[part], encodings, targets, seeds[part], threat, budget)
        encodings |= _encode("guide", learner, {"adv": adversarial})
        encodings |= _encode("student", learner, {"adv": adversarial, "clean": pixels[part]})
        terms = learner.objective.terms(encodings, targets)
        loss = weighted(terms, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        measured["loss"].append(loss.detach())
        measured["zero_gradient_share"].append(zero_share.sum() / batch)
        for name, term in terms.items():
            measured[name].append(term.over(batch).detach())
    sums = {name: float(torch.stack(values).sum()) for name, values in measured.items()}
    return Measured(loss=sums.pop("loss"), zero_gradient_share=sums.pop("zero_gradient_share"), terms=sums)


def _attack(
    learner: Learner,
    pixels: Tensor,
    seen: dict[Encoding, Tensor],
    targets: Targets,
    seeds: Sequence[int],
    threat: ThreatModel,
    budget: Budget,
) -> tuple[Tensor, Tensor]:
    """Adversarial images [n, 3, H, W] that raise what the objective attacks, and their zero gradient shares [n]."""
    if not any("_adv" in encoding for encoding in learner.objective.reads):
        return pixels, torch.zeros(len(pixels), device=pixels.device)
    found = pgd(
        lambda x, _: learner.attacked.raw(x),
        pixels,
        lambda features, _: learner.objective.inner(features, seen, targets),  # all rows stay to the end
        threats=[threat] * len(pixels),
        budgets=[budget] * len(pixels),
        seeds=seeds,
        keep="last",
    )
    return found.pixels, found.zero_gradient_share


def _encode(
    who: Literal["student", "guide"], learner: Learner, images: dict[Literal["adv", "clean"], Tensor]
) -> dict[Encoding, Tensor]:
    """What the objective reads of these images and nothing else, in one pass over one batch."""
    reads = learner.objective.reads
    with_tokens = any(name.startswith(who) and name.endswith("_tokens") for name in reads)
    sides = [side for side in images if any(name.startswith(f"{who}_{side}") for name in reads)]
    if not sides:
        return {}
    encoder = learner.student if who == "student" else learner.guide
    batch = torch.cat([images[side] for side in sides])
    with torch.set_grad_enabled(who == "student"):
        outputs = {"": encoder.raw(batch)} if not with_tokens else _with_tokens(encoder, batch)
    found = {
        f"{who}_{side}{suffix}": part
        for suffix, output in outputs.items()
        for side, part in zip(sides, output.chunk(len(sides)), strict=True)
    }
    return {name: found[name] for name in reads if name in found}


def _with_tokens(encoder: PixelEncoder, pixels: Tensor) -> dict[str, Tensor]:
    features, tokens = encoder.raw_with_tokens(pixels)
    return {"": features, "_tokens": tokens}
