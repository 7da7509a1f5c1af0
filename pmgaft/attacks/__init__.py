"""Attacks as pure functions over "pixels -> logits"; they know nothing of CLIP."""

from pmgaft.attacks.apgd import apgd
from pmgaft.attacks.losses import (
    Loss,
    Success,
    cross_entropy_loss,
    dlr_loss,
    margin_loss,
    misclassified,
    reaches,
    targeted_cross_entropy_loss,
    targeted_dlr_loss,
    targeted_margin_loss,
)
from pmgaft.attacks.pgd import pgd
from pmgaft.attacks.search import Adversarial, Budget, Expired, LogitsOf, merged
from pmgaft.attacks.square import square

__all__ = [
    "Adversarial",
    "Budget",
    "Expired",
    "LogitsOf",
    "Loss",
    "Success",
    "apgd",
    "cross_entropy_loss",
    "dlr_loss",
    "margin_loss",
    "merged",
    "misclassified",
    "pgd",
    "reaches",
    "square",
    "targeted_cross_entropy_loss",
    "targeted_dlr_loss",
    "targeted_margin_loss",
]
