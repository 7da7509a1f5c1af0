"""Auto-PGD: gradient ascent that sets its own steps, with threat, budget and seed per row.

Source: Croce and Hein 2020 (arXiv 2003.01690), algorithm 1 and section 3; the checkpoints in whole steps as in their
released evaluation, so that results compare.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pmgaft.attacks.losses import Loss, Success
from pmgaft.attacks.search import (
    Adversarial,
    Budget,
    Expired,
    LogitsOf,
    Search,
    Walk,
    as_pixels,
    check_pixels,
    float32_gradients,
)
from pmgaft.threat import ThreatModel

MOMENTUM = 0.75
"""Weight of the new step against the last one."""

ENOUGH_RISES = 0.75
"""A step is too long where no more than this share of the steps since the last checkpoint raised the loss."""


def apgd(
    logits_of: LogitsOf,
    pixels: Tensor,
    loss: Loss,
    threats: Sequence[ThreatModel],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    *,
    success: Success | None = None,
    expired: Expired | None = None,
    starts: Tensor | None = None,
) -> Adversarial:
    """Adversarial images that raise `loss` inside each row's threat model.

    Called and answering as `pgd` with keep="best"; the differences are in the steps. They begin at 2 eps
    (`Budget.step_size` where given), carry momentum, and at checkpoints each row for itself halves its step and goes
    back to its best point, where the loss rose too rarely or stood still. Give it 50 steps or more: with few,
    checkpoints follow each other at once and the step collapses; below, `pgd` is better. The random start is uniform in
    the ball, where the source scales it to the ball's surface; in the dimensions of images these are the same.
    """
    with float32_gradients(pixels.device):
        search = Search(logits_of, pixels, loss, success, threats, budgets, seeds, expired=expired, starts=starts)
        check_pixels(pixels)
        for restart in range(search.restarts):
            walk = _AdaptiveSteps.begin(search, search.starting_points(restart))
            search.climb(walk[search.still_open(restart)])
        return search.result()


def checkpoints(steps: int) -> list[int]:
    """After how many steps the step size is looked at: the first gap is 22 % of all steps, each next 3 % of all steps
    shorter, at least 6 %; each in whole steps, at least 1."""
    gap, shorter, least = (max(percent * steps // 100, 1) for percent in (22, 3, 6))
    found = [gap]
    while found[-1] <= steps:
        gap = max(gap - shorter, least)
        found.append(found[-1] + gap)
    return found[:-1]


@dataclass(slots=True)
class _AdaptiveSteps(Walk):
    """What each row remembers of this restart.

    gaps: int64 [n, longest budget], at column t the steps since the last checkpoint if one is due after t steps, else
    0. step: pixel units, [n, 1, 1, 1]. previous: the point before x. top, top_gradient, top_loss: at the highest loss
    so far. checked_loss: top_loss at the last checkpoint. last_loss: of the last iterate. rises: int64 [n], steps since
    the last checkpoint that raised the loss. halved: bool [n], at the last checkpoint; true before the first.
    """

    gaps: Tensor
    step: Tensor
    previous: Tensor
    top: Tensor
    top_gradient: Tensor
    top_loss: Tensor
    checked_loss: Tensor
    last_loss: Tensor
    rises: Tensor
    halved: Tensor

    @classmethod
    def begin(cls, search: Search, x: Tensor) -> Self:
        """All rows of the batch, x: [B, 3, H, W], before the first step."""
        budgets, eps = search.budgets, search.balls.eps
        sizes = search.per_row([b.step_size or torch.nan for b in budgets], torch.float32)
        longest = max((b.steps for b in budgets), default=0)
        gaps = {steps: _gaps(steps, longest) for steps in {b.steps for b in budgets}}
        low = torch.full_like(search.steps, -torch.inf, dtype=torch.float32)
        return cls(
            index=torch.arange(len(x), device=x.device),
            x=x,
            balls=search.balls,
            steps=search.steps,
            gaps=search.per_row([gaps[b.steps] for b in budgets], torch.int64).reshape(len(x), longest),
            step=as_pixels(sizes).where(as_pixels(sizes).isfinite(), 2 * eps),
            previous=x,
            top=x,
            top_gradient=torch.zeros_like(x),
            top_loss=low,
            checked_loss=low,
            last_loss=-low,
            rises=torch.zeros_like(search.steps),
            halved=torch.ones_like(search.broken),
        )

    def move(self, taken: int, losses: Tensor, gradient: Tensor) -> None:
        higher = losses > self.top_loss
        self.top = torch.where(as_pixels(higher), self.x, self.top)
        self.top_gradient = torch.where(as_pixels(higher), gradient, self.top_gradient)
        self.top_loss = torch.where(higher, losses, self.top_loss)
        self.rises = self.rises + (losses > self.last_loss)
        self.last_loss = losses
        back = as_pixels(self._halve(self.gaps[:, taken]))
        x = torch.where(back, self.top, self.x)
        ahead = self.balls.project(x + self.step * self.balls.ascent(torch.where(back, self.top_gradient, gradient)))
        momentum = MOMENTUM if taken else 1.0
        self.x = self.balls.project(x + momentum * (ahead - x) + (1 - momentum) * (x - self.previous))
        self.previous = x

    def _halve(self, gap: Tensor) -> Tensor:
        """Where a checkpoint is due, gap above 0, halve the steps of rows whose step is too long: bool [n], those."""
        due = gap > 0
        stuck = ~self.halved & (self.top_loss <= self.checked_loss)
        halve = due & ((self.rises <= ENOUGH_RISES * gap) | stuck)
        self.step = torch.where(as_pixels(halve), self.step / 2, self.step)
        self.halved = torch.where(due, halve, self.halved)
        self.checked_loss = torch.where(due, self.top_loss, self.checked_loss)
        self.rises = torch.where(due, 0, self.rises)
        return halve


def _gaps(steps: int, length: int) -> list[int]:
    """For each count of steps below `length`: steps since the last checkpoint if one is due, else 0."""
    found = [0, *checkpoints(steps)]
    gaps = {now: now - last for last, now in itertools.pairwise(found)}
    return [gaps.get(taken, 0) for taken in range(length)]
