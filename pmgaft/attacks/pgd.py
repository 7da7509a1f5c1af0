"""Projected gradient descent, with threat, budget and seed per row.

Source: Madry et al. 2018 (arXiv 1706.06083), with the habits that make it measure the model and not itself: losses are
summed and never averaged, everything is projected after every step, the best point of each row is kept, and no row
feels its neighbours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from pmgaft.attacks.losses import Loss, Success
from pmgaft.errors import InputError, ThreatError
from pmgaft.threat import ThreatModel

LogitsOf = Callable[[Tensor, Tensor], Tensor]
"""(pixels [n, 3, H, W], positions in the batch int64 [n]) -> logits [n, K]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What an attack may spend on one row.

    steps: gradients per restart, at least 1. step_size: in pixel units; None is 2.5 eps / steps. restarts: independent
    tries from other random starts, at least 1. random_start: begin anywhere in the ball instead of at the image.
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
    expired: Callable[[Tensor], Tensor] | None = None,
) -> Adversarial:
    """Adversarial images that raise `loss` inside each row's threat model.

    pixels: float32 [B, 3, H, W] in [0, 1], model-input grid. threats, budgets, seeds: one per row.
    keep="best": every iterate, the last included, is judged; a row that `success` calls broken leaves at once, and the
    point of highest loss is returned for the others. keep="last", for training: the last iterate as it is, at the cost
    of `steps` forwards and input gradients and nothing else.
    expired, with keep="best": positions int64 [n] -> bool [n], asked once an iterate; rows where it holds are judged
    once more and leave, with what was found so far.
    The global random state, the model's modes and every `.grad` stay as they are; float32 whatever autocast surrounds.
    Raises: InputError where a pixel is no finite number in [0, 1]; ThreatError for several restarts with keep="last".
    """
    _check(pixels, threats, budgets, seeds, keep)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(pixels.device.type, enabled=False),
    ):
        search = _Search(logits_of, pixels.detach().float().clone(), loss, success, threats, budgets, expired)
        for restart in range(max((b.restarts for b in budgets), default=0)):
            rows = search.begin(restart, seeds)
            if keep == "last":
                search.run_last(rows)
            else:
                search.run_best(rows)
        return search.result()


@dataclass(slots=True)
class _Rows:
    """The rows still in play; n of them. eps and step have shape [n, 1, 1, 1] to act on pixels."""

    index: Tensor
    x: Tensor
    origin: Tensor
    eps: Tensor
    step: Tensor
    steps: Tensor
    l2: Tensor

    def where(self, mask: Tensor) -> "_Rows":
        return _Rows(*(getattr(self, field.name)[mask] for field in fields(self)))

    def __len__(self) -> int:
        return self.index.numel()


class _Search:
    """One attack on one batch: the frozen facts about each row, and the best found for it so far."""

    def __init__(
        self,
        logits_of: LogitsOf,
        origin: Tensor,
        loss: Loss,
        success: Success | None,
        threats: Sequence[ThreatModel],
        budgets: Sequence[Budget],
        expired: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.logits_of, self.origin, self.loss, self.success = logits_of, origin, loss, success
        self.expired, self.budgets, self.device = expired, budgets, origin.device
        self.eps = self._per_row([t.eps for t in threats], torch.float32)
        self.step = self._per_row([b.step_for(t.eps) for t, b in zip(threats, budgets, strict=True)], torch.float32)
        self.steps = self._per_row([b.steps for b in budgets], torch.int64)
        self.l2 = self._per_row([t.norm == "l2" for t in threats], torch.bool)
        self.any_l2 = any(t.norm == "l2" for t in threats)
        size = len(threats)
        self.best = origin.clone()
        self.best_loss = torch.full((size,), -torch.inf, device=self.device)
        self.broken = torch.zeros(size, dtype=torch.bool, device=self.device)
        self.finite = torch.ones(size, dtype=torch.bool, device=self.device)
        self.cut_short = torch.zeros(size, dtype=torch.bool, device=self.device)
        self.gradients = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.forwards = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.zeros = torch.zeros(size, device=self.device)

    def _per_row(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def begin(self, restart: int, seeds: Sequence[int]) -> _Rows:
        """The rows that this restart is for, at their starting points."""
        entitled = self._per_row([restart < b.restarts for b in self.budgets], torch.bool)
        index = (entitled & ~self.broken & self.finite & ~self.cut_short).nonzero()[:, 0]
        origin = self.origin if len(index) == len(self.origin) else self.origin[index]
        rows = _Rows(
            index=index,
            x=origin,
            origin=origin,
            eps=_as_pixels(self.eps[index]),
            step=_as_pixels(self.step[index]),
            steps=self.steps[index],
            l2=_as_pixels(self.l2[index]),
        )
        noise = torch.zeros_like(origin)
        generator = torch.Generator(self.device)
        for place, row in enumerate(index.tolist()):
            if self.budgets[row].random_start or restart:
                generator.manual_seed(_seed(seeds[row], restart))
                noise[place] = _unit_noise(origin.shape[1:], generator, l2=self.any_l2 and bool(self.l2[row]))
        rows.x = self._project(rows, origin + rows.eps * noise)
        return rows

    def run_last(self, rows: _Rows) -> None:
        """All steps, no judging. Nothing here waits for the device until the first row is done."""
        shortest, longest = min(b.steps for b in self.budgets), max(b.steps for b in self.budgets)
        for taken in range(longest):
            if taken >= shortest:
                done = rows.steps <= taken
                self.best[rows.index[done]] = rows.x[done]
                rows = rows.where(~done)
            x = rows.x.requires_grad_()
            self._climb(rows, x, self.loss(self.logits_of(x, rows.index), rows.index))
        self.best[rows.index] = rows.x
        self.best_loss.fill_(torch.nan)

    def run_best(self, rows: _Rows) -> None:
        """Judge every iterate; rows leave when broken, not finite, or out of steps."""
        longest = int(rows.steps.max()) if len(rows) else -1
        for taken in range(longest + 1):
            gone = self.expired(rows.index) if self.expired else torch.zeros_like(rows.index, dtype=torch.bool)
            last = taken == longest or (self.expired is not None and bool(gone.all()))
            x = rows.x if last else rows.x.requires_grad_()
            with torch.set_grad_enabled(not last):
                logits = self.logits_of(x, rows.index)
                losses = self.loss(logits, rows.index)
            settled = self._judge(rows, logits.detach(), losses.detach())
            self.cut_short[rows.index] |= gone & ~settled & (rows.steps > taken)
            leaves = settled | gone | (rows.steps <= taken)
            if last or bool(leaves.all()):
                return
            self._climb(rows, x, losses, ~leaves)
            rows = rows.where(~leaves) if bool(leaves.any()) else rows

    def _judge(self, rows: _Rows, logits: Tensor, losses: Tensor) -> Tensor:
        """Keep what is better than before; bool [n], true where nothing is left to search."""
        index, finite = rows.index, losses.isfinite()
        broken = finite & self.success(logits, index) if self.success else torch.zeros_like(finite)
        better = finite & (broken | (losses > self.best_loss[index]))
        self.best[index] = torch.where(_as_pixels(better), rows.x.detach(), self.best[index])
        self.best_loss[index] = torch.where(better, losses, self.best_loss[index])
        self.broken[index] |= broken
        self.finite[index] &= finite
        self.forwards[index] += 1
        return broken | ~self.finite[index]

    def _climb(self, rows: _Rows, x: Tensor, losses: Tensor, counted: Tensor | None = None) -> None:
        """One step up the sum of the losses. Rows not counted are about to leave and are moved for nothing."""
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        finite = gradient.flatten(1).isfinite().all(dim=1)
        zeros = (gradient == 0).flatten(1).float().mean(dim=1)
        taking = torch.ones_like(finite) if counted is None else counted
        self.finite[rows.index] &= finite | ~taking
        self.gradients[rows.index] += taking
        self.zeros[rows.index] += zeros * taking
        start = x.detach()
        moved = self._project(rows, start + rows.step * self._direction(rows, gradient))
        rows.x = torch.where(_as_pixels(finite), moved, start)

    def _direction(self, rows: _Rows, gradient: Tensor) -> Tensor:
        """Steepest ascent of unit length in each row's norm; a zero gradient has none."""
        if not self.any_l2:
            return gradient.sign()
        norm = _l2_norm(gradient)
        return torch.where(rows.l2, gradient / norm.where(norm > 0, 1.0), gradient.sign())

    def _project(self, rows: _Rows, x: Tensor) -> Tensor:
        """Into the ball, then into [0, 1]. For l2 feasible, since the image lies in the box, if not the nearest
        point."""
        inside = torch.maximum(torch.minimum(x, rows.origin + rows.eps), rows.origin - rows.eps)
        if self.any_l2:
            delta = x - rows.origin
            shrunk = delta * (rows.eps / _l2_norm(delta).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1.0)
            inside = torch.where(rows.l2, rows.origin + shrunk, inside)
        return inside.clamp(0.0, 1.0)

    def result(self) -> Adversarial:
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


def _check(
    pixels: Tensor, threats: Sequence[ThreatModel], budgets: Sequence[Budget], seeds: Sequence[int], keep: str
) -> None:
    rows = {len(pixels), len(threats), len(budgets), len(seeds)}
    if len(rows) != 1:
        raise ValueError(f"{len(pixels)} images, {len(threats)} threats, {len(budgets)} budgets, {len(seeds)} seeds")
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise InputError("pixels must be finite numbers in [0, 1]; normalisation belongs inside the model")
    if keep == "last" and any(b.restarts > 1 for b in budgets):
        raise ThreatError("several restarts need keep='best'", field="restarts", code="restarts_invalid")


def _unit_noise(shape: Sequence[int], generator: torch.Generator, *, l2: bool) -> Tensor:
    """Uniform in the unit ball of the norm: float32 of the shape of one image."""
    if not l2:
        return torch.rand(tuple(shape), generator=generator, device=generator.device) * 2 - 1
    direction = torch.randn(tuple(shape), generator=generator, device=generator.device)
    radius: Tensor = torch.rand((), generator=generator, device=generator.device) ** (1 / direction.numel())
    return direction / _l2_norm(direction[None])[0] * radius


def _seed(seed: int, restart: int) -> int:
    """A seed of 63 bits for each restart; restart 0 has the row's own. The factor is the golden ratio's."""
    return (seed + restart * 0x9E3779B97F4A7C15) % 2**63


def _l2_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return _as_pixels(norm)


def _as_pixels(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)
