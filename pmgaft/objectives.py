"""The losses of training, one small function each, by name.

Letters: x clean pixels, x_a adversarial pixels, f the student, f0 the guide (the frozen original), T unit text
features, z = s cos(f, T) with the logit scale s, P = softmax(z). Every function here is pure.

An objective names the encodings it reads (so that a training step computes these and no others) and gives terms, each
with its weight. Terms are per sample: [n], and a batch that is processed in parts adds up to what it would be whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Encoding = Literal["student_adv", "student_clean", "guide_adv", "guide_clean"]
"""Who saw what: raw image features float32 [n, D]. Those of the guide carry no gradient."""

Encodings = Mapping[Encoding, Tensor]
Direction = Literal["teacher-first", "student-first"]
Reduction = Literal["batchmean", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a batch is compared with.

    labels: int64 [n]. texts: unit features of the training classes [K, D]. guide_texts: unit features of the texts that
    the guide speaks over [G, D]; the training classes themselves, or a longer list. scale: the logit scale s.
    """

    labels: Tensor
    texts: Tensor
    guide_texts: Tensor
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a loss: values [n] per sample, and how they are weighted and reduced over a batch."""

    values: Tensor
    weight: float
    reduction: Reduction = "batchmean"

    def over(self, batch: int) -> Tensor:
        """The unweighted scalar that these samples contribute to a batch of this size."""
        total = self.values.sum()
        return total if self.reduction == "sum" else total / batch


Terms = Mapping[str, Term]


def weighted(terms: Terms, batch: int) -> Tensor:
    """The loss: the weighted sum of all terms, a scalar. Samples of a larger batch give their share of it."""
    return torch.stack([term.weight * term.over(batch) for term in terms.values()]).sum()


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss ready to use: the encodings it reads, and its terms."""

    reads: frozenset[Encoding]
    terms: Callable[[Encodings, Targets], Terms]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The settings of the objectives.

    ce: cross entropy on x_a. alpha: guide on x_a. beta: clean branch. gamma: guide on clean x. feature: squared
    distance of f(x_a) from the guide's features of clean x. kl_direction: "teacher-first" is KL(Q || P_a), where Q is
    the guide's or the clean branch's distribution; "student-first" is KL(P_a || Q). reduction: of the KL terms over the
    batch. detach_clean: no gradient into the clean branch.
    """

    ce: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.0
    feature: float = 0.0
    kl_direction: Direction = "teacher-first"
    reduction: Reduction = "batchmean"
    detach_clean: bool = False


def cosine_logits(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    """s cos(features, texts): features [n, D] of any length, texts unit [K, D] -> [n, K]."""
    return scale * F.normalize(features, dim=1) @ texts.T


def divergence(teacher: Tensor, student: Tensor, direction: Direction) -> Tensor:
    """KL between softmax(teacher) and softmax(student), logits [n, K] -> [n], at least 0 up to rounding."""
    if direction == "student-first":
        teacher, student = student, teacher
    log_p, log_q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def pmg_aft(weights: Weights) -> Objective:
    """PMG-AFT (Wang et al., CVPR 2024, arXiv 2401.04350), in every reading that its settings can express.

    ce CE(z(f, x_a), y) + alpha KL(P(f0, x_a) || P(f, x_a)) + beta KL(P(f, x) || P(f, x_a)), and beyond the paper
    gamma KL(P(f0, x) || P(f, x_a)), a guide that no attack can fool, and feature |f(x_a) - f0(x)|^2, which is FARE's
    (Schlarmann et al. 2024, arXiv 2402.12336; raw features, summed over D). Both guides speak over `guide_texts`.
    A term whose weight is zero costs nothing.
    """

    def terms(encodings: Encodings, targets: Targets) -> Terms:
        adversarial = encodings["student_adv"]
        logits = cosine_logits(adversarial, targets.texts, targets.scale)
        parts = {"ce": Term(values=F.cross_entropy(logits, targets.labels, reduction="none"), weight=weights.ce)}

        def guide(name: str, encoding: Encoding, weight: float) -> None:
            teacher = cosine_logits(encodings[encoding], targets.guide_texts, targets.scale)
            student = cosine_logits(adversarial, targets.guide_texts, targets.scale)
            values = divergence(teacher, student, weights.kl_direction)
            parts[name] = Term(values=values, weight=weight, reduction=weights.reduction)

        if weights.alpha:
            guide("guide_adv", "guide_adv", weights.alpha)
        if weights.gamma:
            guide("guide_clean", "guide_clean", weights.gamma)
        if weights.beta:
            clean = cosine_logits(encodings["student_clean"], targets.texts, targets.scale)
            values = divergence(clean.detach() if weights.detach_clean else clean, logits, weights.kl_direction)
            parts["clean"] = Term(values=values, weight=weights.beta, reduction=weights.reduction)
        if weights.feature:
            values = (adversarial - encodings["guide_clean"]).square().sum(dim=1)
            parts["feature"] = Term(values=values, weight=weights.feature)
        return parts

    reads: dict[Encoding, bool] = {
        "student_adv": True,
        "student_clean": bool(weights.beta),
        "guide_adv": bool(weights.alpha),
        "guide_clean": bool(weights.gamma or weights.feature),
    }
    return Objective(frozenset(encoding for encoding, needed in reads.items() if needed), terms)


def tecoa(weights: Weights) -> Objective:
    """Cross entropy on adversarial images alone (Mao et al., ICLR 2023, arXiv 2212.07016)."""

    def terms(encodings: Encodings, targets: Targets) -> Terms:
        logits = cosine_logits(encodings["student_adv"], targets.texts, targets.scale)
        return {"ce": Term(values=F.cross_entropy(logits, targets.labels, reduction="none"), weight=weights.ce)}

    return Objective(frozenset({"student_adv"}), terms)


def finetune(weights: Weights) -> Objective:
    """Cross entropy on clean images: ordinary fine-tuning, without any attack."""

    def terms(encodings: Encodings, targets: Targets) -> Terms:
        logits = cosine_logits(encodings["student_clean"], targets.texts, targets.scale)
        return {"ce": Term(values=F.cross_entropy(logits, targets.labels, reduction="none"), weight=weights.ce)}

    return Objective(frozenset({"student_clean"}), terms)


OBJECTIVES: Mapping[str, Callable[[Weights], Objective]] = {"pmg-aft": pmg_aft, "tecoa": tecoa, "finetune": finetune}
