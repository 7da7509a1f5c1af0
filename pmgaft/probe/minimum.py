"""The smallest change that changes an answer: a search over radii that goes on from what it has found.

First the margins to the likeliest rivals are linearised at the image, and the nearest of their boundaries is where the
search begins. Then a descent along the decision boundary: each row's ball shrinks while its point is adversarial and
grows while it is not, and the point takes one normalised gradient step of the margin inside that ball. Where nothing
adversarial is known yet, the ball reaches as far as the linearised margin asks. At last attempts: PGD in a ball a
little smaller than the best distance, starting at the best point; the first that fails ends the search and is the
bracket's lower end.

Sources: Rony et al. 2019 (arXiv 1811.09600, DDN: a radius that grows and shrinks); Pintor et al. 2021 (arXiv
2102.12827, FMN: the linearised distance, steps and shrinking annealed by a cosine). Ours are steps in units of the
ball, which need no absolute size, and the attempts at the end.
Letters: B rows of a batch, n of them in play, K answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.attacks import Budget, Expired, LogitsOf, Loss, Success, pgd
from pmgaft.attacks.search import Balls, as_pixels, check_pixels, float32_gradients, l2_norm
from pmgaft.threat import Norm, ThreatModel

DESCENT_SHARE = 0.8
"""Of the gradients; the attempts may use what is left."""

STEP = (1.0, 0.02)
"""Of the ball's radius, at first and at last."""

SHRINKING = (0.1, 0.002)
"""Of the ball, a step, at first and at last."""

MOST_RIVALS = 5
"""Answers whose boundaries are linearised at the start, a gradient each."""

ATTEMPT_STEPS = 10
MOST_ATTEMPTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """What a search found; B rows, in the order given.

    pixels: float32 [B, 3, H, W], the nearest adversarial image, or the image itself where there is none. distance:
    float32 [B], its own in the row's norm, inf where there is none. failed: [B], the largest smaller radius at which an
    attempt found nothing; 0 where none was made. first_order: [B], see MinEps; inf for a zero gradient. cut_short: bool
    [B], out of time. finite: bool [B], false where logits or gradients were no finite numbers.
    """

    pixels: Tensor
    distance: Tensor
    failed: Tensor
    first_order: Tensor
    cut_short: Tensor
    finite: Tensor
    gradients_used: Tensor
    forwards_used: Tensor


def nearest_adversarial(
    logits_of: LogitsOf,
    pixels: Tensor,
    labels: Tensor,
    norms: Sequence[Norm],
    gradients: Sequence[int],
    seeds: Sequence[int],
    *,
    targets: Tensor | None = None,
    resolutions: Sequence[float] | None = None,
    starts: Tensor | None = None,
    expired: Expired | None = None,
) -> Nearest:
    """Search each row's smallest adversarial change.

    pixels: float32 [B, 3, H, W] in [0, 1]. labels: int64 [B], the answers to change. norms, gradients (at most, at
    least 2), seeds, resolutions (0.02): one per row. targets: int64 [B], the answer each row must reach, -1 for any
    other than the label's. starts: [B, 3, H, W], adversarial images known already; others do no harm.
    A row's result is what it would get alone. float32, whatever autocast surrounds.
    Raises: InputError where a pixel is no finite number in [0, 1].
    """
    check_pixels(pixels)
    aims = torch.full_like(labels, -1) if targets is None else targets
    widths = [0.02] * len(pixels) if resolutions is None else list(resolutions)
    with float32_gradients(pixels.device):
        search = _Search(logits_of, pixels.detach().float().clone(), labels, aims, norms, expired)
        if starts is not None:
            search.take(starts.detach().float(), torch.arange(len(pixels), device=pixels.device))
        most = torch.tensor(list(gradients), device=pixels.device)
        x, eps = search.begin((most // 10).clamp(1, MOST_RIVALS))
        search.descend(x, eps, ((most * DESCENT_SHARE).long() - search.gradients).clamp_min(1))
        search.attempt(most, widths, seeds)
        return search.result()


class _Search:
    def __init__(
        self,
        logits_of: LogitsOf,
        origin: Tensor,
        labels: Tensor,
        targets: Tensor,
        norms: Sequence[Norm],
        expired: Expired | None,
    ) -> None:
        self.logits_of, self.origin, self.norms, self.expired = logits_of, origin, norms, expired
        self.labels, self.targets = labels, targets
        self.loss, self.success = _gap(labels, targets), _success(labels, targets)
        device, size = origin.device, len(origin)
        self.l2 = torch.tensor([norm == "l2" for norm in norms], dtype=torch.bool, device=device)
        self.largest = torch.where(self.l2, math.sqrt(origin[0].numel()) if size else 1.0, 1.0)
        self.best = origin.clone()
        self.distance = torch.full((size,), torch.inf, device=device)
        self.failed = torch.zeros(size, device=device)
        self.first_order = torch.full((size,), torch.inf, device=device)
        self.cut_short = torch.zeros(size, dtype=torch.bool, device=device)
        self.finite = torch.ones_like(self.cut_short)
        self.gradients = torch.zeros(size, dtype=torch.int64, device=device)
        self.forwards = torch.zeros_like(self.gradients)

    def result(self) -> Nearest:
        return Nearest(
            pixels=self.best,
            distance=self.distance,
            failed=self.failed,
            first_order=self.first_order,
            cut_short=self.cut_short,
            finite=self.finite,
            gradients_used=self.gradients,
            forwards_used=self.forwards,
        )

    def take(self, x: Tensor, index: Tensor) -> None:
        """Look at points [n, 3, H, W] of some rows, and keep those that are nearer."""
        with torch.no_grad():
            logits = self._logits(x, index)
        self._keep(x, index, self.success(logits, index))

    def begin(self, most: Tensor) -> tuple[Tensor, Tensor]:
        """Linearise the margins to the likeliest rivals at the image itself, and go where the nearest of the linear
        boundaries lies: points [B, 3, H, W] and radii [B]. The likeliest rival's boundary need not be the nearest.
        most: int64 [B], gradients to be spent on it.
        """
        index = torch.arange(len(self.origin), device=self.origin.device)
        x = self.origin.clone().requires_grad_()
        logits = self._logits(x, index)
        self._keep(self.origin, index, self.success(logits.detach(), index))
        self.finite &= self.loss(logits, index).detach().isfinite()
        wanted, unwanted = self._rivals(logits.detach())
        direction = torch.zeros_like(x)
        largest = int(most.max()) if len(most) else 0
        for turn in range(min(largest, wanted.shape[1])):
            gap = logits.gather(1, wanted[:, turn : turn + 1]) - logits.gather(1, unwanted[:, turn : turn + 1])
            there = (
                gap.detach()[:, 0].isfinite() & (most > turn) & (self.distance > 0) & self.finite & ~self._late(index)
            )
            if not bool(there.any()):
                break
            gradient, dual = self._gradient(
                gap.masked_fill(~there[:, None], 0.0), x, index, there.nonzero()[:, 0], again=True
            )
            ahead = torch.where(there, gap.detach()[:, 0].abs() / dual, torch.inf)
            nearer = ahead < self.first_order
            direction = torch.where(as_pixels(nearer), gradient, direction)
            self.first_order = torch.where(nearer, ahead, self.first_order)
        eps = torch.minimum(self.first_order, self.largest)
        balls = self._balls(index, eps)
        return balls.project(self.origin + as_pixels(eps) * balls.ascent(direction)), eps

    def _rivals(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of answers whose logits must swap, the likeliest first: int64 [B, R] each. For a target there is one
        pair, with the largest other logit; further ones repeat it."""
        count = min(MOST_RIVALS, logits.shape[1] - 1)
        labels = self.labels[:, None]
        likeliest = logits.scatter(1, labels, -torch.inf).topk(count, dim=1).indices
        aims = self.targets.clamp_min(0)[:, None]
        ahead = logits.scatter(1, aims, -torch.inf).argmax(dim=1, keepdim=True)
        away = self.targets[:, None] < 0
        return torch.where(away, likeliest, aims), torch.where(away, labels, ahead).expand(-1, count)

    def descend(self, x: Tensor, eps: Tensor, steps: Tensor) -> None:
        """From points x with radii eps [B]; steps: int64 [B]."""
        index = torch.arange(len(self.origin), device=self.origin.device)
        longest = int(steps.max()) if len(steps) else -1
        for taken in range(longest + 1):
            late = self._late(index)
            x = x.detach().requires_grad_(taken < longest)
            logits = self._logits(x, index)
            gaps = self.loss(logits, index)
            broke = self.success(logits.detach(), index)
            self._keep(x.detach(), index, broke)
            self.finite[index] &= gaps.detach().isfinite()
            ends = steps[index] <= taken
            settled = ~self.finite[index] | (self.distance[index] == 0)
            self.cut_short[index] |= late & ~settled & ~ends
            staying = (~(settled | late | ends)).nonzero()[:, 0]
            if not len(staying):
                return
            gradient, dual = self._gradient(gaps, x, index, staying)
            ahead = (gaps.detach().abs() / dual)[staying]
            index, broke, x, gradient = index[staying], broke[staying], x.detach()[staying], gradient[staying]
            eps = self._radius(eps[staying], x, index, broke, ahead, taken, steps[index])
            balls = self._balls(index, eps)
            step = as_pixels(_annealed(STEP, taken, steps[index]) * eps)
            x = balls.project(x + step * balls.ascent(gradient))

    def attempt(self, gradients: Tensor, resolutions: Sequence[float], seeds: Sequence[int]) -> None:
        """Smaller and smaller balls, each from the best point of the last, until one holds. gradients: int64 [B], at
        most, with those of the descent."""
        narrower = 1 - torch.tensor(resolutions, device=self.origin.device)
        for _ in range(MOST_ATTEMPTS):
            found = self.distance.isfinite() & (self.distance > 0) & self.finite & ~self.cut_short
            index = (found & (self.failed == 0) & (self.gradients < gradients)).nonzero()[:, 0]
            if not len(index):
                return
            radii = (narrower * self.distance)[index]
            left = (gradients - self.gradients)[index].clamp(max=ATTEMPT_STEPS).tolist()
            rows = index.tolist()
            tried = pgd(
                lambda x, places, index=index: self.logits_of(x, index[places]),  # type: ignore[misc]
                self.origin[index],
                lambda logits, places, index=index: self.loss(logits, index[places]),  # type: ignore[misc]
                [
                    ThreatModel(norm=self.norms[row], eps=radius)
                    for row, radius in zip(rows, radii.tolist(), strict=True)
                ],
                [Budget(steps=steps) for steps in left],
                [seeds[row] for row in rows],
                success=lambda logits, places, index=index: self.success(logits, index[places]),  # type: ignore[misc]
                expired=None if self.expired is None else lambda places, index=index: self._late(index[places]),  # type: ignore[misc]
                starts=self.best[index],
            )
            self.gradients[index] += tried.gradients_used
            self.forwards[index] += tried.forwards_used
            self.cut_short[index] |= tried.cut_short
            self.finite[index] &= tried.finite
            held = ~tried.success & ~tried.cut_short & tried.finite
            self.failed[index] = torch.where(held, radii, self.failed[index])
            self._keep(tried.pixels, index, tried.success)

    def _radius(
        self, eps: Tensor, x: Tensor, index: Tensor, broke: Tensor, ahead: Tensor, taken: int, steps: Tensor
    ) -> Tensor:
        """The next ball of each row, [n]. broke: bool [n]; ahead: [n], from x to the linearised boundary."""
        change = _annealed(SHRINKING, taken, steps)
        nearest = self.distance[index]
        reach = torch.maximum(self._norm(x - self.origin[index], index) + ahead, eps * (1 + change))
        grown = torch.where(nearest.isinf(), reach, torch.minimum(eps * (1 + change), nearest))
        return torch.minimum(torch.where(broke, torch.minimum(eps, nearest) * (1 - change), grown), self.largest[index])

    def _gradient(
        self, gaps: Tensor, x: Tensor, index: Tensor, staying: Tensor, *, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[n, 3, H, W] of the margins, and its dual norm [n]; 0 where it is not finite. again: others will follow."""
        (gradient,) = torch.autograd.grad(gaps.sum(), x, retain_graph=again)
        finite = torch.linalg.vector_norm(gradient, ord=torch.inf, dim=(1, 2, 3)).isfinite()
        stays = index[staying]
        self.gradients[stays] += 1
        self.finite[stays] &= finite[staying]
        gradient = gradient.where(as_pixels(finite), 0.0)
        dual = torch.where(self.l2[index], l2_norm(gradient).flatten(), gradient.abs().sum(dim=(1, 2, 3)))
        return gradient, dual

    def _keep(self, x: Tensor, index: Tensor, broke: Tensor) -> None:
        distance = self._norm(x - self.origin[index], index)
        inside = ((x >= 0) & (x <= 1)).all(dim=(1, 2, 3)) if len(x) else broke
        nearer = broke & inside & (distance < self.distance[index])
        self.best[index] = torch.where(as_pixels(nearer), x, self.best[index])
        self.distance[index] = torch.where(nearer, distance, self.distance[index])

    def _logits(self, x: Tensor, index: Tensor) -> Tensor:
        self.forwards[index] += 1
        return self.logits_of(x, index).float()

    def _late(self, index: Tensor) -> Tensor:
        return torch.zeros_like(index, dtype=torch.bool) if self.expired is None else self.expired(index)

    def _norm(self, delta: Tensor, index: Tensor) -> Tensor:
        linf = torch.linalg.vector_norm(delta, ord=torch.inf, dim=(1, 2, 3))
        return torch.where(self.l2[index], l2_norm(delta).flatten(), linf)

    def _balls(self, index: Tensor, eps: Tensor) -> Balls:
        origin, l2, radius = self.origin[index], as_pixels(self.l2[index]), as_pixels(eps)
        reach = torch.where(l2, 1.0, radius)
        return Balls(origin, (origin - reach).clamp(min=0), (origin + reach).clamp(max=1), radius, l2)


def _gap(labels: Tensor, targets: Tensor) -> Loss:
    """Positive exactly where a row has got what it wants: the best of what it wants minus the best of the rest."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        named = torch.where(targets[rows] < 0, labels[rows], targets[rows])[:, None]
        one, others = logits.gather(1, named)[:, 0], logits.scatter(1, named, -torch.inf).amax(dim=1)
        return torch.where(targets[rows] < 0, others - one, one - others)

    return loss


def _success(labels: Tensor, targets: Tensor) -> Success:
    def success(logits: Tensor, rows: Tensor) -> Tensor:
        answer = logits.argmax(dim=1)
        changed = torch.where(targets[rows] < 0, answer != labels[rows], answer == targets[rows])
        return changed & (logits.amax(dim=1).isfinite()) & ~logits.isnan().any(dim=1)

    return success


def _annealed(ends: tuple[float, float], taken: int, steps: Tensor) -> Tensor:
    """From one value to another along half a cosine, each row in its own number of steps: [n]."""
    first, last = ends
    return last + (first - last) * (1 + torch.cos(math.pi * taken / (steps - 1).clamp_min(1))) / 2
