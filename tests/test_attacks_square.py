"""The Square attack: its schedule, its patterns, and what it finds without a gradient."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from pmgaft.attacks import Budget, LogitsOf, margin_loss, misclassified, square
from pmgaft.attacks.square import bump_pair, side
from pmgaft.threat import ThreatModel

SHAPE = (3, 5, 7)
CPU = torch.device("cpu")


def linear() -> tuple[Tensor, LogitsOf]:
    weights = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return weights, lambda x, rows: torch.einsum("nchw,kchw->nk", x, weights)


def images(count: int) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_squares_shrink_as_the_source_says() -> None:
    """Share 0.8, halved after 10, 50, 200, ... squares, whatever the budget."""
    expected = {0: 89, 10: 89, 11: 63, 51: 45, 201: 32, 501: 22, 1001: 16, 2001: 11, 4001: 8, 6001: 6, 8001: 4}
    assert {tried: side(100, 100, tried, "linf") for tried in expected} == expected
    assert [side(100, 100, tried, "l2") for tried in (0, 11, 8001)] == [89, 63, 5]
    assert side(100, 30, 0, "linf") == 30
    assert side(2, 2, 0, "l2") == 2


def test_a_bump_pair_is_equation_2() -> None:
    """By the double sum of the source, entry by entry."""

    def bump(height: int, width: int) -> Tensor:
        middle = height // 2
        values = torch.zeros(height, width)
        for r in range(1, height + 1):
            for s in range(1, width + 1):
                depth = middle - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
                values[r - 1, s - 1] = sum(1 / (middle + 1 - k) ** 2 for k in range(depth + 1))
        return values

    for length in (1, 2, 3, 4, 7, 10):
        expected = torch.cat([bump(length, length // 2), -bump(length, length - length // 2)], dim=1)
        torch.testing.assert_close(bump_pair(length, CPU), expected / expected.norm())


@pytest.mark.parametrize(("norm", "dual", "share"), [("linf", 1, 0.75), ("l2", 2, 0.4)])
def test_square_comes_near_the_worst_case_of_a_linear_model_and_never_past_it(
    norm: Literal["linf", "l2"], dual: int, share: float
) -> None:
    weights, logits_of = linear()
    x, eps = images(3), 0.05
    threat = ThreatModel(norm=norm, eps=eps)
    found = square(logits_of, x, margin_loss(zeros(3)), [threat] * 3, [Budget(steps=700)] * 3, range(3))
    before, after = (logits_of(pixels, zeros(3)) @ torch.tensor([1.0, -1.0]) for pixels in (x, found.pixels))
    worst = eps * float((weights[0] - weights[1]).norm(p=dual))
    assert float((before - after).max()) <= worst * (1 + 1e-5)
    assert float((before - after).min()) >= share * worst
    delta = (found.pixels - x).flatten(1)
    distance = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    torch.testing.assert_close(distance, torch.full((3,), eps), rtol=1e-4, atol=0)


def test_every_query_is_counted_and_no_gradient_is_taken() -> None:
    calls: list[tuple[int, bool]] = []
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        calls.append((len(rows), torch.is_grad_enabled() or x.requires_grad))
        return linear_logits(x, rows).round()

    budgets = [Budget(steps=5), Budget(steps=2)]
    threats = [ThreatModel(eps=1e-5)] * 2
    found = square(logits_of, images(2), margin_loss(zeros(2)), threats, budgets, range(2))
    assert calls == [(2, False)] * 2 + [(1, False)] * 3
    assert found.forwards_used.tolist() == [5, 2]
    assert found.gradients_used.tolist() == [0, 0]


def test_stripes_run_from_top_to_bottom_and_squares_are_square() -> None:
    seen: list[Tensor] = []
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        seen.append(x.clone())
        return linear_logits(x, rows)

    x, eps = images(1), 0.05
    square(logits_of, x, margin_loss(zeros(1)), [ThreatModel(eps=eps)], [Budget(steps=60)], [0])
    stripes = (seen[0] - x)[0]
    torch.testing.assert_close(stripes.abs(), torch.full(SHAPE, eps))
    assert bool((stripes.sign() == stripes.sign()[:, :1]).all())
    assert 0 < float((stripes > 0).float().mean()) < 1
    changed = (seen[1] != seen[0]).any(dim=1)[0]
    rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
    assert len(rows) <= side(5, 7, 0, "linf")
    assert len(columns) <= side(5, 7, 0, "linf")


def test_a_worse_square_is_forgotten() -> None:
    """The best point found is where every further square starts, so the loss returned never falls with the budget."""
    _, logits_of = linear()
    losses = [
        square(
            logits_of,
            images(4),
            margin_loss(zeros(4)),
            [ThreatModel(eps=0.05)] * 4,
            [Budget(steps=steps)] * 4,
            range(4),
        ).loss
        for steps in (1, 5, 20, 80)
    ]
    for less, more in itertools.pairwise(losses):
        assert bool((more >= less).all())
    assert bool((losses[-1] > losses[0]).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rows_are_what_they_would_be_alone_and_leave_when_broken(norm: Literal["linf", "l2"]) -> None:
    _, linear_logits = linear()
    offset = torch.tensor([0.0, 0.0, 0.5, 100.0])  # the last row never breaks
    x = images(4)
    clean = linear_logits(x, zeros(4))
    labels = clean.argmax(dim=1)
    other = [ThreatModel(norm="l2" if norm == "linf" else "linf", eps=0.02)]

    def attack(rows: list[int]) -> tuple[Tensor, int]:
        def logits_of(pixels: Tensor, places: Tensor) -> Tensor:
            chosen = torch.tensor(rows)[places]
            bonus = torch.nn.functional.one_hot(labels[chosen], 2) * offset[chosen, None]
            return linear_logits(pixels, places) + bonus

        found = square(
            logits_of,
            x[rows],
            margin_loss(labels[rows]),
            [ThreatModel(norm=norm, eps=0.1 if norm == "linf" else 0.8), *other * (len(rows) - 1)],
            [Budget(steps=40, restarts=2)] * len(rows),
            rows,
            success=misclassified(labels[rows]),
        )
        return found.pixels[0], int(found.forwards_used[0])

    for row in range(4):
        alone, spent = attack([row])
        together, spent_together = attack([row, *(r for r in range(4) if r != row)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        assert spent == spent_together
        if row == 3:
            assert spent == 80
    assert attack([0])[1] < 80


def test_restarts_draw_other_squares() -> None:
    _, logits_of = linear()
    threats = [ThreatModel(eps=0.05)] * 4
    once, twice = (
        square(logits_of, images(4), margin_loss(zeros(4)), threats, [Budget(steps=3, restarts=r)] * 4, range(4)).loss
        for r in (1, 4)
    )
    assert bool((twice >= once).all())
    assert bool((twice > once).any())


def test_starts_replace_the_stripes() -> None:
    seen: list[Tensor] = []
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        seen.append(x.clone())
        return linear_logits(x, rows)

    x = images(1)
    starts = x + 0.01
    budget = Budget(steps=1)
    square(logits_of, x, margin_loss(zeros(1)), [ThreatModel(eps=0.05)], [budget], [0], starts=starts)
    torch.testing.assert_close(seen[0], starts)


def test_an_l2_square_takes_the_norm_of_another_and_what_of_eps_is_unused() -> None:
    """Algorithm 3 of the source, read off the first square after a known start that uses half of eps."""
    seen: list[Tensor] = []
    count, channels, height, width, eps = 12, 3, 12, 30, 1.0

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.stack([x.flatten(1).sum(dim=1), -x.flatten(1).sum(dim=1)], dim=1)

    x = torch.full((count, channels, height, width), 0.5)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    delta = 0.5 * eps * torch.nn.functional.normalize(noise.flatten(1), dim=1).reshape(x.shape)
    threats, budgets = [ThreatModel(norm="l2", eps=eps)] * count, [Budget(steps=2)] * count
    square(logits_of, x, margin_loss(zeros(count)), threats, budgets, range(count), starts=x + delta)
    length, after = side(height, width, 0, "l2"), seen[1] - x
    torch.testing.assert_close(after.flatten(1).norm(dim=1), torch.full((count,), eps), rtol=1e-4, atol=0)
    apart = 0
    for row in range(count):
        emptied = (after[row].abs().amax(dim=(0, 1)) < 1e-6).nonzero()[:, 0]
        same = ((after[row] - delta[row]).abs().amax(dim=(0, 1)) < 1e-6).nonzero()[:, 0]
        assert len(emptied) + len(same) == width - length  # as high as the image: all that is no window stays
        apart += len(emptied)
        windows = torch.ones(width, dtype=torch.bool)
        windows[same] = False
        moved, held = after[row][:, :, windows], delta[row][:, :, windows]
        unused = (eps**2 - float(delta[row].norm()) ** 2) / channels
        torch.testing.assert_close(moved.norm(dim=(1, 2)), (held.norm(dim=(1, 2)) ** 2 + unused).sqrt())
        windows[emptied] = False
        first, old = after[row][:, :, windows], delta[row][:, :, windows]
        for channel in range(channels):
            direction = first[channel] / first[channel].norm()
            pattern = direction - old[channel] / old[channel].norm() * float(
                (direction * old[channel]).sum() / old[channel].norm()
            )
            pair = bump_pair(length, CPU)
            alike = max(abs(float((pattern * p).sum() / pattern.norm())) for p in (pair, pair.T))
            assert alike > 0.95  # all that is new in the first window is the pair of bumps
    assert apart > 0
