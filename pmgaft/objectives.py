"""The losses of training, one small class each, by name: settings as fields, and what they make of a batch.

Letters: x clean pixels, x_a adversarial pixels, y labels, f the student, f0 the guide (the frozen original), T unit
text features, c = cos(f, T), z = s c with the logit scale s, P = softmax(z). Everything here is pure.

An objective names the encodings it reads (so that a training step computes these and no others), what the inner
attack climbs, and its terms, each with its weight. Terms are per sample: [n], and a batch that is processed in parts
adds up to what it would be whole. Nearly all of them are one of two primitives, a cross entropy with a soft target
(`soft_cross_entropy`, `divergence`) and a distance of features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, get_args

import torch
from annotated_types import Gt, Interval
from torch import Tensor
from torch.nn import functional as F

Encoding = Literal[
    "student_adv",
    "student_clean",
    "guide_adv",
    "guide_clean",
    "student_adv_tokens",
    "student_clean_tokens",
    "guide_clean_tokens",
]
"""Who saw what: raw image features float32 [n, D], or patch tokens in the same space [n, L, D]. Those of the guide
carry no gradient."""

Encodings = Mapping[Encoding, Tensor]
Direction = Literal["teacher-first", "student-first"]
Reduction = Literal["batchmean", "sum"]
Weight = Annotated[float, Interval(ge=0, lt=math.inf)]
Positive = Annotated[float, Interval(gt=0, lt=math.inf)]

_MAP_SIDE = 224


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
    weight: float = 1.0
    reduction: Reduction = "batchmean"

    def over(self, batch: int) -> Tensor:
        """The unweighted scalar that these samples contribute to a batch of this size."""
        total = self.values.sum()
        return total if self.reduction == "sum" else total / batch


Terms = Mapping[str, Term]


def weighted(terms: Terms, batch: int) -> Tensor:
    """The loss: the weighted sum of all terms, a scalar. Samples of a larger batch give their share of it."""
    return torch.stack([term.weight * term.over(batch) for term in terms.values()]).sum()


def cosine_logits(features: Tensor, texts: Tensor, scale: float) -> Tensor:
    """s cos(features, texts): features [n, D] of any length, texts unit [K, D] -> [n, K]."""
    return scale * F.normalize(features, dim=1) @ texts.T


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """ln((1 - p) / p) of the labels: logits [n, K], labels int64 [n] -> [n].

    Cross entropy is its softplus, so an attack may climb either; this one's gradient does not fade where the model is
    sure.
    """
    own = logits.gather(1, labels[:, None])
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1) - own[:, 0]


def soft_cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """-sum_k q_k ln softmax(logits)_k: target distributions q [n, K], logits [n, K] -> [n]."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1)


def divergence(teacher: Tensor, student: Tensor, direction: Direction) -> Tensor:
    """KL between softmax(teacher) and softmax(student), logits [n, K] -> [n], at least 0 up to rounding."""
    if direction == "student-first":
        teacher, student = student, teacher
    log_p, log_q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def dirichlet_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(Dir(first) || Dir(second)) of positive concentrations float64 [n, K] -> [n]."""
    total, other_total = first.sum(dim=1), second.sum(dim=1)
    spread = (torch.lgamma(second) - torch.lgamma(first)).sum(dim=1)
    means = torch.digamma(first) - torch.digamma(total)[:, None]
    return torch.lgamma(total) - torch.lgamma(other_total) + spread + ((first - second) * means).sum(dim=1)


def attention_map(tokens: Tensor, texts: Tensor) -> Tensor:
    """Where a picture resembles a text: tokens [n, L, D] of L = side^2 patches, unit texts [n, D] -> [n, 224^2].

    The cosines, stretched to [0, 1] per picture and enlarged bilinearly.
    """
    similarity = (F.normalize(tokens, dim=2) @ texts[:, :, None])[:, :, 0]
    low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
    stretched = (similarity - low) / (high - low).clamp_min(torch.finfo(similarity.dtype).eps)
    side = math.isqrt(stretched.shape[1])
    enlarged = F.interpolate(stretched.reshape(-1, 1, side, side), (_MAP_SIDE, _MAP_SIDE), mode="bilinear")
    return enlarged.flatten(1)


class Objective(Protocol):
    """A loss ready to use; its fields are the settings that recipes know it by."""

    @property
    def name(self) -> str:
        """As recipes call it."""

    @property
    def logit_scale(self) -> Literal["model"] | float:
        """The model's own, or a number; 1 switches it off."""

    @property
    def guide_texts(self) -> str:
        """What the guide speaks over."""

    @property
    def reads(self) -> frozenset[Encoding]:
        """The encodings that the terms are made of."""

    def inner(self, features: Tensor, seen: Encodings, targets: Targets) -> Tensor:
        """What the inner attack climbs: raw features of x_a [n, D] -> [n]. `seen` has the guide's encodings of x."""

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """The parts of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What all objectives have in common.

    logit_scale: the model's own, or a number; 1 switches it off. guide_texts: what a guide that compares with texts
    speaks over: "classes" (of the training set), or a word list: "imagenet-names", or a file's path.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    logit_scale: Literal["model"] | Annotated[float, Gt(0)] = "model"
    guide_texts: str = "classes"

    def inner(self, features: Tensor, seen: Encodings, targets: Targets) -> Tensor:
        """The cross entropy of the labels, as log odds."""
        return log_odds(cosine_logits(features, targets.texts, targets.scale), targets.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class PmgAft(_Settings):
    """PMG-AFT (Wang et al., CVPR 2024, arXiv 2401.04350), in every reading that its settings can express.

    ce CE(z(f, x_a), y) + alpha KL(P(f0, x_a) || P(f, x_a)) + beta KL(P(f, x) || P(f, x_a)), and beyond the paper
    gamma KL(P(f0, x) || P(f, x_a)), a guide that no attack can fool, and feature |f(x_a) - f0(x)|^2, which is FARE's.
    Both guides speak over `guide_texts`. A term whose weight is zero costs nothing.

    kl_direction: "teacher-first" as above, or "student-first", KL(P(f, x_a) || .). reduction: of the KL terms over the
    batch; the cross entropy is always the mean. detach_clean: no gradient into the clean branch.
    """

    name: Literal["pmg-aft"] = "pmg-aft"
    ce: Weight = 1.0
    alpha: Weight = 1.0
    beta: Weight = 1.0
    gamma: Weight = 0.0
    feature: Weight = 0.0
    kl_direction: Direction = "teacher-first"
    reduction: Reduction = "batchmean"
    detach_clean: bool = False

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch, and what a weight above zero asks for."""
        needed: dict[Encoding, bool] = {
            "student_adv": True,
            "student_clean": bool(self.beta),
            "guide_adv": bool(self.alpha),
            "guide_clean": bool(self.gamma or self.feature),
        }
        return frozenset(encoding for encoding, wanted in needed.items() if wanted)

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """ce, guide_adv, guide_clean, clean, feature, as far as they have weights."""
        adversarial = encodings["student_adv"]
        logits = cosine_logits(adversarial, targets.texts, targets.scale)
        parts = {"ce": Term(values=_hard_cross_entropy(logits, targets), weight=self.ce)}

        def guide(encoding: Encoding, weight: float) -> None:
            teacher = cosine_logits(encodings[encoding], targets.guide_texts, targets.scale)
            student = cosine_logits(adversarial, targets.guide_texts, targets.scale)
            values = divergence(teacher, student, self.kl_direction)
            parts[encoding] = Term(values=values, weight=weight, reduction=self.reduction)

        if self.alpha:
            guide("guide_adv", self.alpha)
        if self.gamma:
            guide("guide_clean", self.gamma)
        if self.beta:
            clean = cosine_logits(encodings["student_clean"], targets.texts, targets.scale)
            values = divergence(clean.detach() if self.detach_clean else clean, logits, self.kl_direction)
            parts["clean"] = Term(values=values, weight=self.beta, reduction=self.reduction)
        if self.feature:
            values = _squared_distance(adversarial, encodings["guide_clean"])
            parts["feature"] = Term(values=values, weight=self.feature)
        return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Tecoa(_Settings):
    """TeCoA (Mao et al., ICLR 2023, arXiv 2212.07016): CE(z(f, x_a), y), cross entropy on adversarial images alone."""

    name: Literal["tecoa"] = "tecoa"

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch."""
        return frozenset({"student_adv"})

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """ce."""
        logits = cosine_logits(encodings["student_adv"], targets.texts, targets.scale)
        return {"ce": Term(values=_hard_cross_entropy(logits, targets))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetune(_Settings):
    """Ordinary fine-tuning, without any attack: CE(z(f, x), y) on clean images."""

    name: Literal["finetune"] = "finetune"

    @property
    def reads(self) -> frozenset[Encoding]:
        """The clean branch."""
        return frozenset({"student_clean"})

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """ce."""
        logits = cosine_logits(encodings["student_clean"], targets.texts, targets.scale)
        return {"ce": Term(values=_hard_cross_entropy(logits, targets))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fare(_Settings):
    """FARE (Schlarmann et al., ICML 2024, arXiv 2402.12336): |f(x_a) - f0(x)|^2, no labels, no texts.

    Raw features, summed over their dimensions; the inner attack climbs the same distance, and needs a random start
    where student and guide are equal. clean_weight w: w |f(x) - f0(x)|^2 + (1 - w) times the above.
    """

    name: Literal["fare"] = "fare"
    clean_weight: Annotated[float, Interval(ge=0, le=1)] = 0.0

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch and the guide on clean images; the clean branch if it has weight."""
        clean: frozenset[Encoding] = frozenset({"student_clean"} if self.clean_weight else ())
        return clean | {"student_adv", "guide_clean"}

    def inner(self, features: Tensor, seen: Encodings, targets: Targets) -> Tensor:
        """The distance from the guide's features of the clean image."""
        return _squared_distance(features, seen["guide_clean"])

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """feature, and clean_feature if it has weight."""
        original = encodings["guide_clean"]
        distance = _squared_distance(encodings["student_adv"], original)
        parts = {"feature": Term(values=distance, weight=1 - self.clean_weight)}
        if self.clean_weight:
            kept = _squared_distance(encodings["student_clean"], original)
            parts["clean_feature"] = Term(values=kept, weight=self.clean_weight)
        return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Caw(_Settings):
    """CAW, confidence-aware weighting (arXiv 2510.02913), from its formula as summarised by others.

    CE(z(f, x_a), y) + alpha KL(P(f, x_a) || P(f0, x)) (1 - P(f, x_a)_y) + beta |f(x_a) - f0(x_a)|, raw features. The
    paper's alpha and beta are not public; neither is whether the weight 1 - P_y carries gradient: here it does, as the
    formula is written.
    """

    name: Literal["caw"] = "caw"
    alpha: Weight = 1.0
    beta: Weight = 1.0

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch, and the guide on both images."""
        return frozenset({"student_adv", "guide_adv", "guide_clean"})

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """ce, guide_clean, feature."""
        adversarial = encodings["student_adv"]
        logits = cosine_logits(adversarial, targets.texts, targets.scale)
        student = cosine_logits(adversarial, targets.guide_texts, targets.scale)
        teacher = cosine_logits(encodings["guide_clean"], targets.guide_texts, targets.scale)
        unsure = 1 - logits.softmax(dim=1).gather(1, targets.labels[:, None])[:, 0]
        return {
            "ce": Term(values=_hard_cross_entropy(logits, targets)),
            "guide_clean": Term(values=divergence(teacher, student, "student-first") * unsure, weight=self.alpha),
            "feature": Term(values=_distance(adversarial, encodings["guide_adv"]), weight=self.beta),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Agft(_Settings):
    """AGFT (arXiv 2603.29410): the guide's softened answer to the clean image is the only target; no labels.

    Soft-label cross entropy between q = softmax(gamma r s c(f0, x)) and softmax(r s c(f, x_a)), over `guide_texts`; the
    inner attack climbs the same. sharpness r and gamma as published: 1.8 (a scale of 180 where s is 100) and 0.4.
    """

    name: Literal["agft"] = "agft"
    sharpness: Positive = 1.8
    gamma: Positive = 0.4

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch and the guide on clean images."""
        return frozenset({"student_adv", "guide_clean"})

    def inner(self, features: Tensor, seen: Encodings, targets: Targets) -> Tensor:
        """The same soft-label cross entropy."""
        scale = self.sharpness * targets.scale
        target = cosine_logits(seen["guide_clean"], targets.guide_texts, self.gamma * scale).softmax(dim=1)
        return soft_cross_entropy(target, cosine_logits(features, targets.guide_texts, scale))

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """guide_clean."""
        return {"guide_clean": Term(values=self.inner(encodings["student_adv"], encodings, targets))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ucat(_Settings):
    """UCAT (arXiv 2512.12997): CE(z(f, x_a), y) + lambda KL(Dir(a(f, x_a)) || Dir(a(f0, x))).

    Cosines read as evidence, a = 1e-6 + exp((c + 1) / tau) over `guide_texts`; lambda = strength / exp(softplus(2 /
    tau)). Published: strength 1e5, tau 0.07 at s = 100. tau left out is 7 / s, the same for every scale. In
    float64: the concentrations are of the order 1e8 and their log gammas nearly cancel.
    """

    name: Literal["ucat"] = "ucat"
    strength: Weight = 1e5
    tau: Positive | None = None

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch and the guide on clean images."""
        return frozenset({"student_adv", "guide_clean"})

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """ce, guide_clean."""
        tau = 7 / targets.scale if self.tau is None else self.tau
        logits = cosine_logits(encodings["student_adv"], targets.texts, targets.scale)

        def evidence(encoding: Encoding) -> Tensor:
            cosines = cosine_logits(encodings[encoding], targets.guide_texts, 1.0).double()
            return 1e-6 + torch.exp((cosines + 1) / tau)

        values = dirichlet_divergence(evidence("student_adv"), evidence("guide_clean"))
        return {
            "ce": Term(values=_hard_cross_entropy(logits, targets)),
            # lambda first, sample by sample: the bare divergence may be beyond float32.
            "guide_clean": Term(values=(values * self._lambda(tau)).to(logits.dtype)),
        }

    def _lambda(self, tau: float) -> float:
        return self.strength / (1 + math.exp(2 / tau))  # exp(softplus(t)) = 1 + exp(t)


@dataclass(frozen=True, slots=True, kw_only=True)
class TgaZsr(_Settings):
    """TGA-ZSR (Yu et al., NeurIPS 2024, arXiv 2410.21802), for towers with patch tokens (ViT).

    CE(z(f, x_a), y) + alpha |A(f, x_a) - A(f0, x)| + beta |A(f, x) - A(f0, x)|, where A is the `attention_map` of the
    patch tokens for the true class's text. Published: alpha 0.08, beta 0.05. Tokens are normalised over D; the released
    code normalises over the tokens instead.
    """

    name: Literal["tga-zsr"] = "tga-zsr"
    alpha: Weight = 0.08
    beta: Weight = 0.05

    @property
    def reads(self) -> frozenset[Encoding]:
        """The adversarial branch, and the patch tokens of all three."""
        return frozenset({"student_adv", "student_adv_tokens", "student_clean_tokens", "guide_clean_tokens"})

    def terms(self, encodings: Encodings, targets: Targets) -> Terms:
        """ce, attention, clean_attention."""
        own = targets.texts[targets.labels]
        original = attention_map(encodings["guide_clean_tokens"], own)

        def moved(encoding: Encoding) -> Tensor:
            return _distance(attention_map(encodings[encoding], own), original)

        logits = cosine_logits(encodings["student_adv"], targets.texts, targets.scale)
        return {
            "ce": Term(values=_hard_cross_entropy(logits, targets)),
            "attention": Term(values=moved("student_adv_tokens"), weight=self.alpha),
            "clean_attention": Term(values=moved("student_clean_tokens"), weight=self.beta),
        }


AnyObjective = PmgAft | Tecoa | Finetune | Fare | Caw | Agft | Ucat | TgaZsr

OBJECTIVES: Mapping[str, type[AnyObjective]] = {kind().name: kind for kind in get_args(AnyObjective)}


def _hard_cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    return F.cross_entropy(logits, targets.labels, reduction="none")


def _squared_distance(features: Tensor, others: Tensor) -> Tensor:
    return (features - others).square().sum(dim=1)


def _distance(features: Tensor, others: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(features - others, dim=1)
    return distance
