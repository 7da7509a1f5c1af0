"""The attacks by name, and which of them a number of classes allows.

All are called alike, aim away from the labels, and let a row go as soon as its answer is another class than its label.
Letters: B rows, K classes; classes that a row does not have carry -inf logits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pmgaft.attacks.apgd import apgd
from pmgaft.attacks.losses import (
    Loss,
    cross_entropy_loss,
    dlr_loss,
    margin_loss,
    misclassified,
    targeted_dlr_loss,
    targeted_margin_loss,
)
from pmgaft.attacks.pgd import pgd
from pmgaft.attacks.search import Adversarial, Budget, LogitsOf, merged
from pmgaft.attacks.square import square
from pmgaft.errors import ThreatError
from pmgaft.threat import ThreatModel

MOST_TARGETS = 9
"""Classes that "apgd-t" aims at, one after the other, where there are as many."""


class Attack(Protocol):
    """An attack with its loss."""

    def __call__(
        self,
        logits_of: LogitsOf,
        pixels: Tensor,
        labels: Tensor,
        threats: Sequence[ThreatModel],
        budgets: Sequence[Budget],
        seeds: Sequence[int],
        *,
        clean_logits: Tensor,
        starts: Tensor | None = None,
    ) -> Adversarial:
        """Try to change the answers.

        pixels: float32 [B, 3, H, W] in [0, 1]. labels: int64 [B]. threats, budgets, seeds: one per row; steps are
        queries for "square", and per target for "apgd-t". clean_logits: float32 [B, K], of `pixels`; -inf marks the
        classes that a row does not have. starts: [B, 3, H, W], where the first try of each row begins.
        Raises: ThreatError (attack_unavailable) where a row has too few classes; what the attack itself raises.
        """
        ...


def available(classes: int) -> tuple[str, ...]:
    """Names of the attacks that this many classes allow; none for fewer than two, since the answer cannot change.

    Two classes: cross entropy, margin and Square. From three on the difference of logits ratio and the targeted attack
    as well; the latter's ratio needs four classes, with three it climbs the margin to each target.
    """
    return tuple(name for name, least in _LEAST_CLASSES.items() if classes >= least)


def _named(name: str, search: Callable[..., Adversarial], loss: Callable[[Tensor], Loss]) -> Attack:
    """One loss for all of an attack."""

    def attack(
        logits_of: LogitsOf,
        pixels: Tensor,
        labels: Tensor,
        threats: Sequence[ThreatModel],
        budgets: Sequence[Budget],
        seeds: Sequence[int],
        *,
        clean_logits: Tensor,
        starts: Tensor | None = None,
    ) -> Adversarial:
        _counted(name, clean_logits)
        success = misclassified(labels)
        return search(logits_of, pixels, loss(labels), threats, budgets, seeds, success=success, starts=starts)

    return attack


def _targeted(
    logits_of: LogitsOf,
    pixels: Tensor,
    labels: Tensor,
    threats: Sequence[ThreatModel],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    *,
    clean_logits: Tensor,
    starts: Tensor | None = None,
) -> Adversarial:
    """One run for each of the wrong classes that the clean image comes nearest to, on the rows that still stand."""
    classes = _counted("apgd-t", clean_logits)
    wrong = clean_logits.scatter(1, labels[:, None], -torch.inf)
    likeliest, targets = wrong.topk(min(MOST_TARGETS, wrong.shape[1] - 1), dim=1)

    def run(rows: Tensor, turn: int) -> Adversarial:
        chosen = rows.tolist()
        return apgd(
            lambda x, places: logits_of(x, rows[places]),
            pixels[rows],
            _towards(labels[rows], targets[rows, turn], classes[rows]),
            [threats[row] for row in chosen],
            [budgets[row] for row in chosen],
            [seeds[row] + (turn << 32) for row in chosen],
            success=misclassified(labels[rows]),
            starts=starts[rows] if starts is not None and turn == 0 else None,
        )

    found = run(torch.arange(len(labels), device=labels.device), 0)
    for turn in range(1, targets.shape[1]):
        there = likeliest[:, turn] > -torch.inf
        rows = (there & ~found.success & found.finite).nonzero()[:, 0]
        if not len(rows):
            break
        second = run(rows, turn)
        found = merged(found, second, rows, second.success | (second.loss > found.loss[rows]))
    return found


def _towards(labels: Tensor, targets: Tensor, classes: Tensor) -> Loss:
    """The targeted ratio for rows of four classes and more, the targeted margin for rows of three. classes: int64
    [n]."""
    margin, ratio = targeted_margin_loss(labels, targets), targeted_dlr_loss(labels, targets)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        if logits.shape[1] < 4:
            return margin(logits, rows)
        return torch.where(classes[rows] < 4, margin(logits, rows), ratio(logits, rows))

    return loss


def _counted(name: str, clean_logits: Tensor) -> Tensor:
    """How many classes each row has: int64 [B]. Raises ThreatError where that is too few for the attack."""
    classes = (clean_logits != -torch.inf).sum(dim=1)
    fewest = int(classes.min()) if len(classes) else clean_logits.shape[1]
    least = _LEAST_CLASSES[name]
    if fewest < least:
        offer = ", ".join(available(fewest))
        others = f"with {fewest} there are: {offer}" if offer else "the answer to fewer than two cannot change"
        raise ThreatError(
            f"the attack {name} needs at least {least} classes, not {fewest}; {others}",
            field="attack",
            code="attack_unavailable",
        )
    return classes


_LEAST_CLASSES = {
    "pgd-ce": 2,
    "pgd-margin": 2,
    "apgd-ce": 2,
    "apgd-margin": 2,
    "apgd-dlr": 3,
    "apgd-t": 3,
    "square": 2,
}

ATTACKS: Mapping[str, Attack] = {
    "pgd-ce": _named("pgd-ce", pgd, cross_entropy_loss),
    "pgd-margin": _named("pgd-margin", pgd, margin_loss),
    "apgd-ce": _named("apgd-ce", apgd, cross_entropy_loss),
    "apgd-margin": _named("apgd-margin", apgd, margin_loss),
    "apgd-dlr": _named("apgd-dlr", apgd, dlr_loss),
    "apgd-t": _targeted,
    "square": _named("square", square, margin_loss),
}
