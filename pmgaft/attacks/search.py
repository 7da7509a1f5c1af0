"""What all attacks share: budgets, the ball of each row, and the bookkeeping of one search over one batch.

Rows differ in threat, budget and seed, and none feels its neighbours: losses are summed and never averaged, random
numbers hang on the row's own seed, and rows that are done leave the batch.
Letters: B rows of a batch, n of them still in play.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from pmgaft.attacks.losses import Loss, Success
from pmgaft.attacks.noise import in_unit_ball, seed_tensor
from pmgaft.errors import InputError, ThreatError
from pmgaft.threat import ThreatModel

LogitsOf = Callable[[Tensor, Tensor], Tensor]
"""(pixels float32 [n, 3, H, W], positions in the batch int64 [n]) -> logits [n, K]."""

Expired = Callable[[Tensor], Tensor]
"""Positions in the batch int64 [n] -> bool [n], true where a row's time is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What an attack may spend on one row.

    steps: gradients per restart (queries, for attacks without gradients), at least 1. step_size: in pixel units; None
    leaves it to the attack: 2.5 eps / steps for `pgd`, 2 eps at first for `apgd`. restarts: independent tries from
    other random starts, at least 1. random_start: begin anywhere in the ball instead of at the image.
    Raises: ThreatError for values that make no sense.
    """

    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ThreatError(f"steps must be at least 1, not {self.steps}", field="steps", code="steps_invalid")
        if self.restarts < 1:
            raise ThreatError(
                f"restarts must be at least 1, not {self.restarts}", field="restarts", code="restarts_invalid"
            )
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ThreatError(
                f"step size must be a positive number, not {self.step_size}",
                field="step_size",
                code="step_size_invalid",
            )

    def step_for(self, eps: float) -> float:
        """The step in pixel units for a ball of this radius."""
        return 2.5 * eps / self.steps if self.step_size is None else self.step_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial:
    """What an attack found; B rows, in the order given.

    pixels: float32 [B, 3, H, W] in [0, 1], inside each row's ball. success: bool [B], a broken point was seen (never so
    with keep="last", which does not look). loss: [B], at the point returned; NaN with keep="last". finite: bool [B],
    false where a loss or gradient was NaN or infinite, so that the row proves nothing. cut_short: bool [B], time ran
    out before the budget did, and nothing was found. gradients_used, forwards_used: int64 [B]. zero_gradient_share:
    [B], mean share of gradient entries that were exactly zero.
    """

    pixels: Tensor
    success: Tensor
    loss: Tensor
    finite: Tensor
    cut_short: Tensor
    gradients_used: Tensor
    forwards_used: Tensor
    zero_gradient_share: Tensor


def merged(first: Adversarial, second: Adversarial, rows: Tensor, better: Tensor) -> Adversarial:
    """What two attacks found together, the second on some of the first's rows, and what both cost.

    rows: positions int64 [m] of the second's rows. better: bool [m], where the second's finding replaces the first's.
    """

    def put(name: str) -> Tensor:
        old, new = getattr(first, name), getattr(second, name)
        keep = better.reshape(-1, *[1] * (new.dim() - 1))
        values: Tensor = old.index_copy(0, rows, torch.where(keep, new, old[rows]))
        return values

    gradients = first.gradients_used.index_add(0, rows, second.gradients_used)
    zeros = first.zero_gradient_share * first.gradients_used
    zeros = zeros.index_add(0, rows, second.zero_gradient_share * second.gradients_used)
    return Adversarial(
        pixels=put("pixels"),
        success=put("success"),
        loss=put("loss"),
        finite=first.finite.index_copy(0, rows, first.finite[rows] & second.finite),
        cut_short=first.cut_short.index_copy(0, rows, second.cut_short),
        gradients_used=gradients,
        forwards_used=first.forwards_used.index_add(0, rows, second.forwards_used),
        zero_gradient_share=zeros / gradients.clamp_min(1),
    )


class Rows:
    """A dataclass of tensors, or of further Rows, whose first dimension is rows; None is what no row has."""

    __slots__ = ()

    def __getitem__(self, places: Tensor) -> Self:
        """Some of the rows: positions int64 [m]."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self)(*(None if value is None else value[places] for value in values))


@dataclass(slots=True)
class Balls(Rows):
    """Where the points of n rows may lie: each row's ball around its image, within [0, 1].

    origin, low, high: [n, 3, H, W]; low and high bound the box that is [0, 1] and, for linf, the ball too.
    eps: [n, 1, 1, 1], pixel units. l2: bool [n, 1, 1, 1], or None where every ball is linf.
    """

    origin: Tensor
    low: Tensor
    high: Tensor
    eps: Tensor
    l2: Tensor | None

    @classmethod
    def around(cls, origin: Tensor, threats: Sequence[ThreatModel]) -> Self:
        """origin: [B, 3, H, W]; one threat a row."""
        eps = as_pixels(per_row([t.eps for t in threats], torch.float32, origin.device))
        are_l2 = [t.norm == "l2" for t in threats]
        l2 = as_pixels(per_row(are_l2, torch.bool, origin.device)) if any(are_l2) else None
        reach = eps if l2 is None else torch.where(l2, 1.0, eps)
        return cls(origin, (origin - reach).clamp(min=0), (origin + reach).clamp(max=1), eps, l2)

    def project(self, x: Tensor) -> Tensor:
        """Into the ball, then into [0, 1]: the nearest point for linf; for l2 a feasible one, since the image lies in
        the box."""
        if self.l2 is not None:
            delta = x - self.origin
            shrink = (self.eps / l2_norm(delta).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
            x = torch.where(self.l2, self.origin + shrink * delta, x)
        return torch.clamp(x, self.low, self.high)

    def ascent(self, gradient: Tensor) -> Tensor:
        """Direction of steepest ascent, of unit length in each row's norm; a zero gradient has none."""
        if self.l2 is None:
            return gradient.sign()
        norm = l2_norm(gradient)
        return torch.where(self.l2, gradient / norm.where(norm > 0, 1.0), gradient.sign())

    def random_points(self, seeds: Tensor, stream: int) -> Tensor:
        """Uniform in each ball, cut to [0, 1]. seeds: int64 [n]."""
        l2 = None if self.l2 is None else self.l2.flatten()
        noise = in_unit_ball(seeds, stream, self.origin.shape[1:], l2)
        return self.project(self.origin + self.eps * noise)


@dataclass(slots=True)
class Walk(Rows):
    """The n rows in play of one restart, and how they move.

    index: positions in the batch, int64 [n]. x: [n, 3, H, W]. steps: int64 [n], the budget.
    """

    index: Tensor
    x: Tensor
    balls: Balls
    steps: Tensor

    def move(self, taken: int, losses: Tensor, gradient: Tensor) -> None:
        """Put x one step further, given its losses [n] and their gradient [n, 3, H, W], after `taken` steps."""
        raise NotImplementedError


class Search:
    """One attack on one batch: the facts about each row, and the best found for it so far.

    Nothing here waits for the device; what does is said where it happens.
    """

    def __init__(
        self,
        logits_of: LogitsOf,
        pixels: Tensor,
        loss: Loss,
        success: Success | None,
        threats: Sequence[ThreatModel],
        budgets: Sequence[Budget],
        seeds: Sequence[int],
        *,
        expired: Expired | None = None,
        starts: Tensor | None = None,
    ) -> None:
        if len({len(pixels), len(threats), len(budgets), len(seeds)}) != 1:
            raise ValueError(
                f"{len(pixels)} images, {len(threats)} threats, {len(budgets)} budgets, {len(seeds)} seeds"
            )
        if starts is not None and starts.shape != pixels.shape:
            raise ValueError(f"starts of shape {tuple(starts.shape)} for images of shape {tuple(pixels.shape)}")
        self._logits_of, self._loss, self._success, self._expired = logits_of, loss, success, expired
        self.budgets, self.device, size = budgets, pixels.device, len(budgets)
        origin = pixels.detach().float().clone()
        self.balls = Balls.around(origin, threats)
        self.seeds = seed_tensor(seeds, self.device)
        self.steps = self.per_row([b.steps for b in budgets], torch.int64)
        self._starts = None if starts is None else self.balls.project(starts.detach().float())
        self.best = origin.clone()
        self.best_loss = torch.full((size,), -torch.inf, device=self.device)
        self.broken = torch.zeros(size, dtype=torch.bool, device=self.device)
        self.finite = torch.ones_like(self.broken)
        self.cut_short = torch.zeros_like(self.broken)
        self.gradients = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.forwards = torch.zeros_like(self.gradients)
        self.zeros = torch.zeros(size, device=self.device)

    @property
    def restarts(self) -> int:
        """The most that any row is entitled to."""
        return max((b.restarts for b in self.budgets), default=0)

    def per_row(self, values: Sequence[float] | Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
        """One value a row, [B], or several, [B, values]."""
        return per_row(values, dtype, self.device)

    def still_open(self, restart: int) -> Tensor:
        """Positions of the rows that this restart is for: int64 [n]. Waits for the device."""
        entitled = self.per_row([restart < b.restarts for b in self.budgets], torch.bool)
        return (entitled & ~self.broken & self.finite & ~self.cut_short).nonzero()[:, 0]

    def starting_points(self, restart: int) -> Tensor:
        """Where this restart begins: [B, 3, H, W]. The first at `starts` where given, else at the image for rows
        without random start."""
        if restart == 0 and self._starts is not None:
            return self._starts
        random = [restart > 0 or b.random_start for b in self.budgets]
        if not any(random):
            return self.balls.origin
        points = self.balls.random_points(self.seeds, restart)
        if all(random):
            return points
        return torch.where(as_pixels(self.per_row(random, torch.bool)), points, self.balls.origin)

    def logits(self, x: Tensor, index: Tensor) -> Tensor:
        """[n, K] in float32, whatever the model's own precision."""
        self.forwards[index] += 1
        return self._logits_of(x, index).float()

    def losses(self, logits: Tensor, index: Tensor) -> Tensor:
        """[n]."""
        return self._loss(logits, index)

    def climb(self, walk: Walk) -> None:
        """Judge every iterate; rows leave when broken, not finite, out of steps or out of time. Waits for the device
        once an iterate, to learn who leaves."""
        longest = int(walk.steps.max()) if len(walk.index) else -1
        for taken in range(longest + 1):
            late = self.late(walk.index)
            x = walk.x.detach().requires_grad_(taken < longest)
            logits = self.logits(x, walk.index)
            losses = self.losses(logits, walk.index)
            leaves = self.judge(x, walk.index, logits, losses, late=late, out_of_steps=walk.steps <= taken)
            staying = len(leaves) - int(leaves.sum())
            if not staying:
                return
            gradient = self.gradient(x, walk.index, losses, ~leaves)
            walk.move(taken, losses.detach(), gradient)
            if staying < len(leaves):
                walk = walk[(~leaves).nonzero()[:, 0]]

    def late(self, index: Tensor) -> Tensor:
        """Rows out of time: bool [n]."""
        if self._expired is None:
            return torch.zeros_like(index, dtype=torch.bool)
        return self._expired(index)

    def judge(
        self, x: Tensor, index: Tensor, logits: Tensor, losses: Tensor, *, late: Tensor, out_of_steps: Tensor
    ) -> Tensor:
        """Keep what is better than before; bool [n], true where nothing is left to search, or nothing to search
        with."""
        logits, losses = logits.detach(), losses.detach()
        finite = losses.isfinite()
        broken = finite & self._success(logits, index) if self._success else torch.zeros_like(finite)
        better = finite & (broken | (losses > self.best_loss[index]))
        self.best[index] = torch.where(as_pixels(better), x.detach(), self.best[index])
        self.best_loss[index] = torch.where(better, losses, self.best_loss[index])
        self.broken[index] |= broken
        self.finite[index] &= finite
        settled = broken | ~self.finite[index]
        self.cut_short[index] |= late & ~settled & ~out_of_steps
        return settled | late | out_of_steps

    def gradient(self, x: Tensor, index: Tensor, losses: Tensor, counted: Tensor | None = None) -> Tensor:
        """Of the sum of the losses with respect to x: [n, 3, H, W], zero in rows where it is not finite. Rows not
        counted, bool [n], are about to leave and are worked out for nothing."""
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        finite = torch.linalg.vector_norm(gradient, ord=torch.inf, dim=(1, 2, 3)).isfinite()
        zeros = (gradient == 0).float().mean(dim=(1, 2, 3))
        counted = torch.ones_like(finite) if counted is None else counted
        self.finite[index] &= finite | ~counted
        self.gradients[index] += counted
        self.zeros[index] += zeros * counted
        return gradient.where(as_pixels(finite), 0.0)

    def result(self) -> Adversarial:
        """What was found."""
        return Adversarial(
            pixels=self.best,
            success=self.broken,
            loss=self.best_loss,
            finite=self.finite,
            cut_short=self.cut_short,
            gradients_used=self.gradients,
            forwards_used=self.forwards,
            zero_gradient_share=self.zeros / self.gradients.clamp_min(1),
        )


@contextmanager
def float32_gradients(device: torch.device) -> Iterator[None]:
    """Gradients on, in float32, whatever autocast, no_grad or inference mode surrounds."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def check_pixels(pixels: Tensor) -> None:
    """Raise InputError where a pixel is no finite number in [0, 1]. Waits for the device."""
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise InputError("pixels must be finite numbers in [0, 1]; normalisation belongs inside the model")


def per_row(values: Sequence[float] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[B], or [B, values], on the device, which nobody waits for."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def as_pixels(values: Tensor) -> Tensor:
    """[n] as [n, 1, 1, 1], to act on pixels."""
    return values.reshape(-1, 1, 1, 1)


def l2_norm(x: Tensor) -> Tensor:
    """[n, 3, H, W] -> [n, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return norm
