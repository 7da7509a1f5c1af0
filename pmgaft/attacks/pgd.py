"""Projected gradient descent, with threat, budget and seed per row.

Source: Madry et al. 2018 (arXiv 1706.06083), with the habits that make it measure the model and not itself: losses are
summed and never averaged, everything is projected after every step, the best point of each row is kept, and no row
feels its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    per_row,
)
from pmgaft.errors import ThreatError
from pmgaft.threat import ThreatModel


def pgd(
    logits_of: LogitsOf,
    pixels: Tensor,
    loss: Loss,
    threats: Sequence[ThreatModel],
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    *,
    success: Success | None = None,
    keep: Literal["best", "last"] = "best",
    expired: Expired | None = None,
    starts: Tensor | None = None,
) -> Adversarial:
    """Adversarial images that raise `loss` inside each row's threat model.

    pixels: float32 [B, 3, H, W] in [0, 1], model-input grid. threats, budgets, seeds: one per row.
    keep="best": every iterate, the last included, is judged; a row that `success` calls broken leaves at once, and the
    point of highest loss is returned for the others. keep="last", for training: the last iterate as it is, at the cost
    of `steps` forwards and input gradients and nothing else; the host never waits for the device, so nobody looks
    whether the pixels lie in [0, 1].
    expired, with keep="best": positions int64 [n] -> bool [n], asked once an iterate; rows where it holds are judged
    once more and leave, with what was found so far.
    starts: float32 [B, 3, H, W], where the first restart begins, projected into the balls; None: as the budgets say.
    The global random state, the model's modes and every `.grad` stay as they are; float32 whatever autocast surrounds.
    Raises: InputError where a pixel is no finite number in [0, 1]; ThreatError for several restarts with keep="last".
    """
    if keep == "last" and any(b.restarts > 1 for b in budgets):
        raise ThreatError("several restarts need keep='best'", field="restarts", code="restarts_invalid")
    with float32_gradients(pixels.device):
        search = Search(logits_of, pixels, loss, success, threats, budgets, seeds, expired=expired, starts=starts)
        sizes = [budget.step_for(threat.eps) for threat, budget in zip(threats, budgets, strict=True)]
        step = as_pixels(search.per_row(sizes, torch.float32))
        everyone = torch.arange(len(pixels), device=pixels.device)
        if keep == "last":
            _run_blind(search, _ConstantSteps(everyone, search.starting_points(0), search.balls, search.steps, step))
            return search.result()
        check_pixels(pixels)
        for restart in range(search.restarts):
            walk = _ConstantSteps(everyone, search.starting_points(restart), search.balls, search.steps, step)
            search.climb(walk[search.still_open(restart)])
        return search.result()


@dataclass(slots=True)
class _ConstantSteps(Walk):
    """step: pixel units, [n, 1, 1, 1]."""

    step: Tensor

    def move(self, taken: int, losses: Tensor, gradient: Tensor) -> None:
        self.x = self.balls.project(self.x.detach() + self.step * self.balls.ascent(gradient))


def _run_blind(search: Search, walk: Walk) -> None:
    """All steps, no judging. Which rows are done is known from the budgets, so that nothing waits for the device."""
    rows = list(range(len(search.budgets)))
    for taken in range(max((b.steps for b in search.budgets), default=0)):
        staying = [place for place, row in enumerate(rows) if search.budgets[row].steps > taken]
        if len(staying) < len(rows):
            search.best[walk.index] = walk.x
            walk = walk[per_row(staying, torch.int64, search.device)]
            rows = [rows[place] for place in staying]
        x = walk.x.detach().requires_grad_()
        losses = search.losses(search.logits(x, walk.index), walk.index)
        walk.move(taken, losses.detach(), search.gradient(x, walk.index, losses))
    search.best[walk.index] = walk.x
    search.best_loss.fill_(torch.nan)
