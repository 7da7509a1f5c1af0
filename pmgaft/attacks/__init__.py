"""Attacks as pure functions over "pixels -> logits"; they know nothing of CLIP."""

from pmgaft.attacks.apgd import apgd
from pmgaft.attacks.losses import Loss, Success, cross_entropy_loss, dlr_loss, margin_loss, misclassified
from pmgaft.attacks.pgd import pgd
from pmgaft.attacks.search import Adversarial, Budget, Expired, LogitsOf

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
    "misclassified",
    "pgd",
]
