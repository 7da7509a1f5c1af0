"""What an attack climbs, one value per sample, and what counts as broken.

Each function here takes class indices of the whole batch, labels or targets, int64 [B], and gives a function of the
logits of the rows still in play, [n, K], and of their positions in the batch, int64 [n]. Classes that a row does not
have carry -inf logits. K must be at least 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
Success = Callable[[Tensor, Tensor], Tensor]

_DIVISOR_GUARD = 1e-12


def cross_entropy_loss(labels: Tensor) -> Loss:
    """Cross entropy of the labels as log odds, ln((1 - p) / p): [n], grows without bound.

    CE = ln(1 + exp(log odds)), so both rise together and, sample by sample, have gradients of one direction. But where
    the model is sure, CE's gradient rounds to zero (in float32 from a logit margin of about 17 on the true class's
    part, from about 103 on everything) and the attack would stand still; that of the log odds never fades.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        own, others = _split(logits, labels[rows])
        return others.logsumexp(dim=1) - own

    return loss


def margin_loss(labels: Tensor) -> Loss:
    """Largest other logit minus the label's: [n], positive exactly where the label has lost.

    Source: Carlini and Wagner 2017 (arXiv 1608.04644), f6 without its floor.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        own, others = _split(logits, labels[rows])
        return others.amax(dim=1) - own

    return loss


def dlr_loss(labels: Tensor) -> Loss:
    """Difference of logits ratio, (max other logit - label's) / (largest - third largest logit): [n].

    From -1 to 0 while the label leads, positive where it has lost. Free of the logits' scale and offset. Needs three
    classes that are there: with two, the third largest logit is -inf and the ratio 0 everywhere. Source: Croce and Hein
    2020 (arXiv 2003.01690), equation 6; the guard against a vanishing divisor, 1e-12, is theirs.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        own, others = _split(logits, labels[rows])
        top = logits.topk(3, dim=1).values
        return (others.amax(dim=1) - own) / (top[:, 0] - top[:, 2] + _DIVISOR_GUARD)

    return loss


def targeted_cross_entropy_loss(targets: Tensor) -> Loss:
    """Log odds of the targets, ln(p / (1 - p)): [n], rises as the cross entropy towards the target falls, and like
    `cross_entropy_loss` without its fading gradients."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        own, others = _split(logits, targets[rows])
        return own - others.logsumexp(dim=1)

    return loss


def targeted_margin_loss(labels: Tensor, targets: Tensor) -> Loss:
    """The target's logit minus the label's: [n], positive exactly where the target has overtaken the label."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return _at(logits, targets[rows]) - _at(logits, labels[rows])

    return loss


def targeted_dlr_loss(labels: Tensor, targets: Tensor) -> Loss:
    """(target's - label's logit) / (largest - mean of the third and fourth largest logit): [n].

    Free of the logits' scale and offset. Needs four classes that are there: with three the ratio is 0 everywhere.
    Source: Croce and Hein 2020 (arXiv 2003.01690), equation 7.
    """

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        top = logits.topk(4, dim=1).values
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _DIVISOR_GUARD
        return (_at(logits, targets[rows]) - _at(logits, labels[rows])) / spread

    return loss


def misclassified(labels: Tensor) -> Success:
    """Whether the answer is another class than the label: bool [n]. A tie goes to the first class, as in serving."""

    def success(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.argmax(dim=1) != labels[rows]

    return success


def reaches(targets: Tensor) -> Success:
    """Whether the answer is the target: bool [n]. A tie goes to the first class."""

    def success(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.argmax(dim=1) == targets[rows]

    return success


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    """One logit a row: [n, K], int64 [n] -> [n]."""
    return logits.gather(1, classes[:, None])[:, 0]


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels' own logits [n], and all logits with the own one at -inf [n, K]."""
    return _at(logits, labels), logits.scatter(1, labels[:, None], -torch.inf)
