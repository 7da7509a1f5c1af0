"""Auto-PGD against its algorithm, written down plainly for one image, and against its rules one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from pmgaft.attacks import Budget, apgd, cross_entropy_loss, margin_loss
from pmgaft.attacks.apgd import checkpoints
from pmgaft.threat import ThreatModel

SHAPE = (3, 4, 5)
Norm = Literal["linf", "l2"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 30, 38, 45]),
        (10, [2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (1, [1]),
    ],
)
def test_checkpoints_lie_where_the_source_puts_them(steps: int, expected: list[int]) -> None:
    assert checkpoints(steps) == expected


def images(count: int, seed: int = 1) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Rugged(nn.Module):
    """Nonlinear enough that a step of 2 eps overshoots again and again."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(60, 40, generator=generator) * 2
        self.second = torch.randn(40, 5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.first).sin() @ self.second


def plainly(
    loss_of: Callable[[Tensor], Tensor], origin: Tensor, start: Tensor, norm: Norm, eps: float, steps: int
) -> tuple[Tensor, float, list[float]]:
    """Algorithm 1 of the paper for one image: the best point, its loss, and the step size used at each step."""

    def project(x: Tensor) -> Tensor:
        delta = x - origin
        delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / float(delta.norm()))
        return (origin + delta).clamp(0, 1)

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        loss = loss_of(x)
        (gradient,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient.sign() if norm == "linf" else gradient / gradient.norm()

    at_checkpoints, last_checkpoint, halved = checkpoints(steps), 0, True
    x, previous, step = start, start, 2 * eps
    losses, sizes = [], []
    top_loss, top, top_direction = -float("inf"), x, x
    checked_loss = top_loss
    for taken in range(steps + 1):
        loss, direction = evaluate(x)
        losses.append(loss)
        if loss > top_loss:
            top_loss, top, top_direction = loss, x, direction
        if taken == steps:
            break
        if taken in at_checkpoints:
            window = range(last_checkpoint, taken)
            rises = sum(losses[t + 1] > losses[t] for t in window)
            halve = rises <= 0.75 * len(window) or (not halved and top_loss <= checked_loss)
            if halve:
                step, x, direction = step / 2, top, top_direction
            last_checkpoint, halved, checked_loss = taken, halve, top_loss
        ahead = project(x + step * direction)
        following = ahead if taken == 0 else project(x + 0.75 * (ahead - x) + 0.25 * (x - previous))
        x, previous = following, x
        sizes.append(step)
    return top, top_loss, sizes


@pytest.mark.parametrize("loss", [cross_entropy_loss, margin_loss])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.4)])
def test_apgd_is_its_algorithm_done_for_each_row_apart(
    norm: Norm, eps: float, loss: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]
) -> None:
    """In float32 as in the attack; rows of two budgets, so that checkpoints fall at different times."""
    model = Rugged()
    x, budgets = images(6), [Budget(steps=50), Budget(steps=30)] * 3
    labels = model(x).argmax(dim=1)
    starts = (x + 0.02).clamp(0, 1)
    threats = [ThreatModel(norm=norm, eps=eps)] * 6
    found = apgd(lambda p, _: model(p), x, loss(labels), threats, budgets, range(6), starts=starts)
    halvings = 0
    for row in range(6):
        own = loss(labels[row : row + 1])
        one = torch.zeros(1, dtype=torch.int64)

        def loss_of(pixels: Tensor, own: Callable[[Tensor, Tensor], Tensor] = own, one: Tensor = one) -> Tensor:
            return own(model(pixels[None]), one)[0]

        top, top_loss, sizes = plainly(loss_of, x[row], starts[row], norm, eps, budgets[row].steps)
        assert float(found.loss[row]) == pytest.approx(top_loss, abs=1e-4)
        torch.testing.assert_close(found.pixels[row], top, rtol=0, atol=1e-4)
        halvings += sizes[-1] < sizes[0]
    assert halvings > 0


def scripted(losses: Callable[[int], float], steps: int = 50) -> list[float]:
    """The sizes of the moves of one pixel, in units of eps, when iterate t has the loss losses(t) and the gradient
    always points upwards. A huge l2 ball far from the box keeps projection and momentum readable."""
    seen: list[float] = []

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        seen.append(float(x.detach()))
        return torch.stack([-x.flatten(1).sum(dim=1), x.flatten(1).sum(dim=1)], dim=1)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        height = logits[:, 1]
        return height - height.detach() + losses(len(seen) - 1)

    x = torch.zeros(1, 1, 1, 1)
    threat = ThreatModel(norm="l2", eps=1e6)
    apgd(logits_of, x, loss, [threat], [Budget(steps=steps, step_size=2.0**-10, random_start=False)], [0])
    return seen


def test_a_loss_that_always_rises_keeps_its_step() -> None:
    seen = scripted(float)
    moves = [b - a for a, b in itertools.pairwise(seen)]
    assert moves == pytest.approx([2.0**-10] * len(moves))


def test_the_step_halves_and_the_search_goes_back_where_three_quarters_or_fewer_steps_raised_the_loss() -> None:
    """Checkpoints after 11, 21, ... steps; of the first 11 steps, 8 or 9 raise the loss: 0.75 x 11 = 8.25."""
    for falls, halves in (({4, 8}, False), ({4, 6, 8}, True)):
        rises = [0.0 if t == 0 else (-0.5 if t in falls else 1.0) for t in range(51)]
        heights = [sum(rises[: t + 1]) for t in range(51)]
        seen = scripted(lambda t, heights=heights: heights[t])  # type: ignore[misc]
        move = seen[12] - seen[11]  # the highest point so far is the last one, so going back is staying
        momentum = seen[11] - seen[10]
        step = (move - 0.25 * momentum) / 0.75
        assert step == pytest.approx(2.0**-11 if halves else 2.0**-10)


def test_the_search_goes_back_to_its_best_point() -> None:
    best = 5
    seen = scripted(lambda t: -abs(t - best))
    step, back = 2.0**-11, seen[11] - seen[10]
    assert seen[12] == pytest.approx(seen[best] + 0.75 * step + 0.25 * (seen[best] - seen[10]))
    assert back == pytest.approx(2.0**-10)


def test_a_best_loss_that_stands_still_halves_the_step_though_the_loss_keeps_rising() -> None:
    """Between the checkpoints after 11 and 21 steps the loss falls once, deep, then rises nine times in ten, but never
    above its best: only the second condition sees that."""
    heights = [float(t) if t <= 11 else -100.0 + t for t in range(51)]
    seen = scripted(lambda t: heights[t])
    before = (seen[21] - seen[20], seen[22] - seen[21])
    assert before[0] == pytest.approx(2.0**-10)
    # back at the best point, seen[11], with half the step
    assert seen[22] == pytest.approx(seen[11] + 0.75 * 2.0**-11 + 0.25 * (seen[11] - seen[20]))


def test_standing_still_right_after_a_halving_does_not_halve_again() -> None:
    """Source: condition 2 asks that the step stayed as it was since the checkpoint before the last."""
    first = [0.0 if t == 0 else float(t % 2) for t in range(12)]  # halves after 11 steps, best loss 1
    heights = [*first, *(-100.0 + t for t in range(12, 52))]
    seen = scripted(lambda t: heights[t])
    step = (seen[22] - seen[21] - 0.25 * (seen[21] - seen[20])) / 0.75
    assert step == pytest.approx(2.0**-11)
