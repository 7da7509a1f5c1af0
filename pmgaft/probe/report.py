"""What a probe answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pmgaft.probe.settings import LossName, ProbeSettings

Verdict = Literal["broken", "not_broken", "inconclusive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One look at the attack itself. passed: None where there was nothing to look at. said: in words, with figures."""

    name: str
    passed: bool | None
    said: str
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The loss at every iterate of one attack, restarts one after the other."""

    loss: LossName
    values: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MinEps:
    """The smallest change found that changes the answer; others may be smaller.

    eps: an upper bound, in the threat's norm, pixel units; None where none was found. failed_eps: the largest smaller
    eps at which an attempt found nothing, and so the bracket's other end; no lower bound. resolution: how near the two
    were to come. index: the label that the answer changes to. first_order: margin over the dual norm of its gradient
    at the image, what a linear model would need; None where that gradient is zero. pixels: float32 [3, H, W], at eps.
    """

    eps: float | None
    failed_eps: float
    resolution: float
    index: int | None
    first_order: float | None
    gradients: int
    finished: bool
    pixels: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEps:
    """One line of the table of targets. index: the target's label; eps: None where it was not reached."""

    index: int
    eps: float | None
    failed_eps: float
    first_order: float | None
    gradients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What a probe found.

    verdict: "broken": an adversarial image inside the threat model was found, and the model's own answer to it is
    another (for a targeted probe: is the target). "not_broken": this attack, with this budget, found none.
    "inconclusive": see reason.
    clean_index, adversarial_index: positions in the image's label list of the model's answers to the image and to the
    strongest image found. probabilities_before, probabilities_after: over that list, to the same two images.
    margin_before, margin_after: logit of the clean answer (its group's largest) minus the largest of all other answers.
    distance: of the strongest image from the original, in the threat's norm, pixel units. attack_gradients: spent on
    the verdict; gradients, forwards: on everything. seconds: of the whole batch. zero_gradient_share: in [0, 1], of the
    gradient entries of the verdict's attack. curves: its losses.
    adversarial_pixels: float32 [3, H, W], if broken. min_eps, targets, health: if asked for.
    """

    verdict: Verdict
    reason: str | None
    settings: ProbeSettings
    clean_index: int
    adversarial_index: int
    probabilities_before: list[float]
    probabilities_after: list[float]
    margin_before: float
    margin_after: float
    distance: float
    attack_gradients: int
    gradients: int
    forwards: int
    seconds: float
    zero_gradient_share: float
    curves: tuple[Curve, ...]
    adversarial_pixels: Tensor | None
    min_eps: MinEps | None
    targets: tuple[TargetEps, ...]
    health: tuple[Check, ...]
