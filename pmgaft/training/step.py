"""One optimiser step: attack, encodings, loss, gradients. Nothing here knows of files, epochs or schedules, and nothing
waits for the device.

Letters: B batch, n part of a batch, K training classes, G guide texts, D features.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from pmgaft.attacks import Budget, pgd
from pmgaft.clip.image import PixelEncoder
from pmgaft.objectives import Encoding, Objective, Targets, Terms, cosine_logits, weighted
from pmgaft.threat import ThreatModel


class Passes(nn.Module):
    """All that a step asks of an encoder, as the forward of one module: what DDP and FSDP watch over."""

    def __init__(self, encoder: PixelEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, precision: torch.dtype, with_tokens: bool = False) -> tuple[Tensor, ...]:
        """pixels: float32 [n, 3, H, W] in [0, 1] -> raw features [n, D], and with_tokens patch tokens [n, L, D].

        The tower runs under autocast where `precision` is not float32; what it gives is float32 always.
        """
        with torch.autocast(pixels.device.type, dtype=precision, enabled=precision != torch.float32):
            outputs = self.encoder.raw_with_tokens(pixels) if with_tokens else (self.encoder.raw(pixels),)
        return tuple(output.float() for output in outputs)


class Shared(Protocol):
    """A student that several ranks train together."""

    @property
    def passes(self) -> nn.Module:
        """The student's Passes, in DDP or FSDP."""

    def met(self, *, now: bool) -> AbstractContextManager[None]:
        """Around a forward and backward: the ranks add up their gradients `now`, or leave that to a later one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Who learns, from whom, and towards what.

    student: being trained, in eval mode throughout, so that what is attacked, updated and served is one function and
    BatchNorm keeps the original's statistics. attacked: a frozen view of the student's own weights (`frozen_view`), so
    that no attack can touch a parameter's gradient; or the student itself. guide: the frozen original. texts: unit
    float32 [K, D] of the training classes; guide_texts: [G, D]. scale: the logit scale. precision: of the towers in the
    objective's forward and backward; attack_precision: in the attack. shared: None for a rank alone.
    """

    student: PixelEncoder
    attacked: PixelEncoder
    guide: PixelEncoder
    objective: Objective
    texts: Tensor
    guide_texts: Tensor
    scale: float
    precision: torch.dtype = torch.float32
    attack_precision: torch.dtype = torch.float32
    shared: Shared | None = None

    def targets(self, labels: Tensor) -> Targets:
        """What these images are compared with. labels: int64 [n]."""
        return Targets(labels=labels, texts=self.texts, guide_texts=self.guide_texts, scale=self.scale)

    def encode(
        self, who: Literal["student", "attacked", "guide"], pixels: Tensor, *, with_tokens: bool = False
    ) -> tuple[Tensor, ...]:
        """pixels: float32 [n, 3, H, W] -> raw features float32 [n, D], and with_tokens patch tokens [n, L, D]."""
        encoder: PixelEncoder = getattr(self, who)
        passes = self.shared.passes if self.shared and encoder is self.student else Passes(encoder)
        found: tuple[Tensor, ...] = passes(
            pixels, self.attack_precision if who == "attacked" else self.precision, with_tokens
        )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a batch some images are.

    whole: images of the whole batch. counted: how many of these images count; the rest are there so that all ranks do
    the same work. ranks: how many average their gradients.
    """

    whole: int
    counted: int
    ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one step saw, on the device: reading a number waits for it.

    values: float32 [m], one for each of `names`: "loss", then "loss_NAME" for each term, unweighted, then
    "zero_gradient_share", the mean share of zero gradient entries in the attack; and, if asked for, the shares of
    images answered rightly, "clean_accuracy" and "robust_accuracy" (of the adversarial image, where the objective has
    one). With several ranks this rank's part of each: their sum is the whole batch's.
    """

    names: tuple[str, ...]
    values: Tensor

    def figures(self) -> dict[str, float]:
        """All numbers by name, fetched at once."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    @property
    def loss(self) -> float:
        """The weighted sum of the terms."""
        return self.figures()["loss"]

    @property
    def terms(self) -> dict[str, float]:
        """Each term, unweighted."""
        figures = self.figures()
        return {name.removeprefix("loss_"): figures[name] for name in self.names if name.startswith("loss_")}


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
    part: Part | None = None,
    with_accuracy: bool = False,
) -> Measured:
    """Add the gradient of the batch's loss to the student's parameters.

    pixels: float32 [B, 3, H, W] in [0, 1]. labels: int64 [B]. seeds: one per image, for the attack's random start.
    part: which part of a batch these images are; None: all of it.
    Costs, in image-encoder passes over the batch: `budget.steps` forwards with input gradient, one forward and backward
    of the student over [x_adv; x] as one batch, one forward of the guide; less where the objective reads less; and with
    accuracy one forward on x where the objective does not read that. The batch is worked off in parts of `micro_batch`,
    which changes speed and memory and not the result.
    """
    part = part or Part(whole=len(pixels), counted=len(pixels))
    measured: dict[str, list[Tensor]] = defaultdict(list)
    starts = range(0, len(pixels), micro_batch)
    for start in starts:
        rows = slice(start, start + micro_batch)
        x, targets = pixels[rows], learner.targets(labels[rows])
        counted = min(max(part.counted - start, 0), len(x))
        encodings = _encode("guide", learner, {"clean": x})
        adversarial, zero_share = _attack(learner, x, encodings, targets, seeds[rows], threat, budget)
        encodings |= _encode("guide", learner, {"adv": adversarial})
        last = start == starts[-1]
        with learner.shared.met(now=last) if learner.shared else nullcontext():
            encodings |= _encode("student", learner, {"adv": adversarial, "clean": x})
            terms = _first(learner.objective.terms(encodings, targets), counted)
            loss = weighted(terms, part.whole)
            (part.ranks * loss).backward()  # type: ignore[no-untyped-call]
        measured["loss"].append(loss.detach())
        for name, term in terms.items():
            measured[f"loss_{name}"].append(term.over(part.whole).detach())
        measured["zero_gradient_share"].append(zero_share[:counted].sum() / part.whole)
        if with_accuracy:
            for name, right in _answers(learner, encodings, x, targets).items():
                measured[name].append(right[:counted].sum() / part.whole)
    values = torch.stack([torch.stack(parts).sum() for parts in measured.values()])
    return Measured(names=tuple(measured), values=values)


def _first(terms: Terms, counted: int) -> Terms:
    """The terms of the first rows alone."""
    return {name: replace(term, values=term.values[:counted]) for name, term in terms.items()}


@torch.no_grad()
def _answers(
    learner: Learner, encodings: Mapping[Encoding, Tensor], pixels: Tensor, targets: Targets
) -> dict[str, Tensor]:
    """Which images the student answers rightly, bool [n], by the figure's name."""
    clean = encodings["student_clean"] if "student_clean" in encodings else learner.encode("attacked", pixels)[0]
    features = {"clean_accuracy": clean}
    if "student_adv" in encodings:
        features["robust_accuracy"] = encodings["student_adv"]
    return {
        name: cosine_logits(value, targets.texts, 1.0).argmax(dim=1) == targets.labels
        for name, value in features.items()
    }


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
        lambda x, _: learner.encode("attacked", x)[0],
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
    batch = torch.cat([images[side] for side in sides])
    with torch.set_grad_enabled(who == "student"):
        outputs = learner.encode(who, batch, with_tokens=with_tokens)
    found = {
        f"{who}_{side}{suffix}": piece
        for suffix, output in zip(("", "_tokens"), outputs, strict=False)
        for side, piece in zip(sides, output.chunk(len(sides)), strict=True)
    }
    return {name: found[name] for name in reads if name in found}
