"""Targeted losses, and the attacks by name: what a number of classes allows, and that each name does what it says."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from pmgaft.attacks import (
    Budget,
    LogitsOf,
    apgd,
    cross_entropy_loss,
    margin_loss,
    merged,
    misclassified,
    pgd,
    reaches,
    targeted_cross_entropy_loss,
    targeted_dlr_loss,
    targeted_margin_loss,
)
from pmgaft.attacks.menu import ATTACKS, available
from pmgaft.errors import ThreatError
from pmgaft.threat import ThreatModel

SHAPE = (3, 4, 5)
MOST_BUDGET = {"square": Budget(steps=60)}


def linear(classes: int, seed: int = 0) -> tuple[Tensor, LogitsOf]:
    weights = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(seed))[:classes]
    return weights, lambda x, rows: torch.einsum("nchw,kchw->nk", x, weights)


def images(count: int, seed: int = 1) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


LOGITS = torch.tensor([[3.0, 1.0, 0.0, -2.0], [3.0, 1.0, 0.0, -2.0]])
ROWS = torch.arange(2)


def test_targeted_ratio_is_that_of_the_source_whatever_scale_and_offset() -> None:
    loss = targeted_dlr_loss(torch.tensor([0, 1]), torch.tensor([1, 2]))
    for logits in (LOGITS, 100 * LOGITS, LOGITS - 5):
        torch.testing.assert_close(loss(logits, ROWS), torch.tensor([-0.5, -0.25]))


def test_targeted_losses_are_signed_distances_to_the_target() -> None:
    labels, targets = torch.tensor([0, 1]), torch.tensor([1, 0])
    torch.testing.assert_close(targeted_margin_loss(labels, targets)(LOGITS, ROWS), torch.tensor([-2.0, 2.0]))
    share = LOGITS.softmax(dim=1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(targeted_cross_entropy_loss(targets)(LOGITS, ROWS), share.logit())
    assert reaches(torch.tensor([0, 1]))(LOGITS, ROWS).tolist() == [True, False]


def test_losses_are_told_which_rows_are_left() -> None:
    labels, targets, rows = torch.tensor([0, 1]), torch.tensor([1, 3]), torch.tensor([1])
    torch.testing.assert_close(targeted_margin_loss(labels, targets)(LOGITS[1:], rows), torch.tensor([-3.0]))
    torch.testing.assert_close(targeted_dlr_loss(labels, targets)(LOGITS[1:], rows), torch.tensor([-0.75]))


@pytest.mark.parametrize("climb", [pgd, apgd])
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_targeted_attack_reaches_its_closed_form_and_its_target(
    climb: type[object], norm: Literal["linf", "l2"], dual: int
) -> None:
    """The largest rise of the target over the label is eps times the dual norm of their weights' difference."""
    weights, logits_of = linear(5)
    x, labels, targets, eps = images(3), torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0]), 0.05
    loss = targeted_margin_loss(labels, targets)
    threats = [ThreatModel(norm=norm, eps=eps)] * 3
    budgets = [Budget(steps=20, random_start=norm == "linf")] * 3
    found = climb(logits_of, x, loss, threats, budgets, range(3))  # type: ignore[call-arg]
    rows = torch.arange(3)
    rise = loss(logits_of(found.pixels, rows), rows) - loss(logits_of(x, rows), rows)  # type: ignore[attr-defined]
    most = eps * torch.stack([(weights[t] - weights[y]).norm(p=dual) for y, t in zip(labels, targets, strict=True)])
    torch.testing.assert_close(rise, most, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [targeted_cross_entropy_loss, None])
def test_success_may_be_reaching_the_target(loss: object) -> None:
    _, logits_of = linear(6)
    x, rows = images(6), torch.arange(6)
    labels = logits_of(x, rows).argmax(dim=1)
    targets = (labels + 1 + rows % 5) % 6
    climbed = targeted_cross_entropy_loss(targets) if loss else targeted_margin_loss(labels, targets)
    threats, budgets = [ThreatModel(eps=0.2)] * 6, [Budget(steps=20)] * 6
    found = pgd(logits_of, x, climbed, threats, budgets, range(6), success=reaches(targets))
    assert torch.equal(logits_of(found.pixels, rows).argmax(dim=1) == targets, found.success)
    assert int(found.success.sum()) >= 4


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (0, ()),
        (1, ()),
        (2, ("pgd-ce", "pgd-margin", "apgd-ce", "apgd-margin", "square")),
        (3, tuple(ATTACKS)),
        (4, tuple(ATTACKS)),
        (10, tuple(ATTACKS)),
    ],
)
def test_the_menu_follows_the_number_of_classes(classes: int, names: tuple[str, ...]) -> None:
    assert available(classes) == names


def run(name: str, classes: int, *, absent: int = 0, norm: Literal["linf", "l2"] = "linf", eps: float = 0.03) -> Tensor:
    """Success [4] of one named attack on a linear model; its `absent` last classes carry -inf."""
    _, plain = linear(classes + absent)

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        logits = plain(x, rows)
        return logits.masked_fill(torch.arange(classes + absent) >= classes, -torch.inf)

    x, rows = images(4), torch.arange(4)
    clean = logits_of(x, rows)
    found = ATTACKS[name](
        logits_of,
        x,
        clean.argmax(dim=1),
        [ThreatModel(norm=norm, eps=eps)] * 4,
        [MOST_BUDGET.get(name, Budget(steps=20))] * 4,
        range(4),
        clean_logits=clean,
    )
    assert bool(found.finite.all())
    assert torch.equal(logits_of(found.pixels, rows).argmax(dim=1) != clean.argmax(dim=1), found.success)
    return found.success


def breakable(classes: int, eps: float) -> Tensor:
    """By the closed form: some class can overtake the answer within the linf ball, bool [4]."""
    weights, logits_of = linear(classes)
    x = images(4)
    clean = logits_of(x, torch.arange(4))
    labels = clean.argmax(dim=1)
    reach = eps * (weights[None] - weights[labels][:, None]).flatten(2).abs().sum(dim=2)
    gaps = clean.gather(1, labels[:, None]) - clean
    return ((gaps < reach) & (torch.arange(classes) != labels[:, None])).any(dim=1)


@pytest.mark.parametrize(("classes", "name"), [(k, name) for k in (2, 3, 4, 10) for name in available(k)])
def test_each_attack_breaks_what_can_be_broken_whatever_classes_others_have(name: str, classes: int) -> None:
    for eps in (0.03, 0.08):
        can = breakable(classes, eps)
        plain, padded = run(name, classes, eps=eps), run(name, classes, absent=3, eps=eps)
        assert torch.equal(plain, padded)
        assert not bool((plain & ~can).any())
        if name in ("apgd-t", "pgd-margin"):
            assert torch.equal(plain, can)
    assert 0 < int(breakable(classes, 0.08).sum()) + int(breakable(classes, 0.03).sum()) < 8


@pytest.mark.parametrize(("name", "classes"), [("apgd-dlr", 2), ("apgd-t", 2), ("square", 1), ("pgd-ce", 1)])
def test_an_attack_that_the_classes_do_not_allow_is_refused_with_those_they_do(name: str, classes: int) -> None:
    for absent in (0, 3):
        with pytest.raises(ThreatError, match="classes") as caught:
            run(name, classes, absent=absent)
        assert caught.value.code == "attack_unavailable"
        assert ("apgd-margin" in caught.value.message) == (classes == 2)


def test_rows_of_different_lists_share_a_batch_and_get_what_they_would_get_alone() -> None:
    """Three, four and twelve classes in one batch: each row has its own targets, and its own targeted loss."""
    _, plain = linear(12)
    sizes = torch.tensor([3, 4, 12, 12])
    x = images(4)

    def logits(pixels: Tensor, rows: Tensor) -> Tensor:
        return plain(pixels, rows).masked_fill(torch.arange(12) >= sizes[rows, None], -torch.inf)

    clean = logits(x, torch.arange(4))
    labels = clean.argmax(dim=1)

    def attack(rows: Tensor) -> tuple[Tensor, Tensor]:
        found = ATTACKS["apgd-t"](
            lambda pixels, places: logits(pixels, rows[places]),
            x[rows],
            labels[rows],
            [ThreatModel(eps=0.003)] * len(rows),
            [Budget(steps=12)] * len(rows),
            rows.tolist(),
            clean_logits=clean[rows],
        )
        return found.pixels, found.gradients_used

    together, spent = attack(torch.arange(4))
    for row in range(4):
        alone, alone_spent = attack(torch.tensor([row]))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-6)
        assert spent[row] == alone_spent[0]
    assert spent.tolist() == [12 * 2, 12 * 3, 12 * 9, 12 * 9]


def test_the_targeted_attack_aims_at_the_nine_likeliest_wrong_classes_in_turn() -> None:
    _, logits_of = linear(12)
    x, rows = images(1), torch.arange(1)
    clean = logits_of(x, rows)
    label = clean.argmax(dim=1)
    seen: list[Tensor] = []

    def watched(pixels: Tensor, places: Tensor) -> Tensor:
        seen.append(pixels.detach().clone())
        return logits_of(pixels, places)

    budget, threats = Budget(steps=1, random_start=False), [ThreatModel(eps=1e-4)]
    ATTACKS["apgd-t"](watched, x, label, threats, [budget], [0], clean_logits=clean)
    order = clean[0].argsort(descending=True)
    assert len(seen) == 2 * 9
    for turn in range(9):
        start = x.clone().requires_grad_()
        ratio = targeted_dlr_loss(label, order[1 + turn : 2 + turn])(logits_of(start, rows), rows)
        (gradient,) = torch.autograd.grad(ratio.sum(), start)
        assert torch.equal((seen[2 * turn + 1] - x).sign(), gradient.sign())


def test_each_target_is_tried_from_another_start() -> None:
    _, logits_of = linear(12)
    x, seen = images(1), []
    clean = logits_of(x, torch.arange(1))

    def watched(pixels: Tensor, places: Tensor) -> Tensor:
        seen.append(pixels.detach().clone())
        return logits_of(pixels, places)

    threats, labels = [ThreatModel(eps=1e-4)], clean.argmax(dim=1)
    ATTACKS["apgd-t"](watched, x, labels, threats, [Budget(steps=1)], [0], clean_logits=clean)
    assert len({tuple(start.flatten().tolist()) for start in seen[::2]}) == 9


def test_two_attacks_merged_keep_the_better_finding_of_each_row_and_both_costs() -> None:
    _, logits_of = linear(5)
    x = images(3)
    labels = logits_of(x, torch.arange(3)).argmax(dim=1)
    threats, rows = [ThreatModel(eps=0.01)] * 3, torch.tensor([2, 0])
    first = pgd(logits_of, x, margin_loss(labels), threats, [Budget(steps=1)] * 3, range(3))
    second = pgd(
        logits_of, x[rows], margin_loss(labels[rows]), threats[:2], [Budget(steps=4)] * 2, [7, 8],
        success=misclassified(labels[rows]),
    )  # fmt: skip
    both = merged(first, second, rows, torch.tensor([True, False]))
    assert torch.equal(both.pixels, torch.stack([first.pixels[0], first.pixels[1], second.pixels[0]]))
    assert torch.equal(both.loss, torch.stack([first.loss[0], first.loss[1], second.loss[0]]))
    assert both.gradients_used.tolist() == [
        1 + int(second.gradients_used[1]),
        1,
        1 + int(second.gradients_used[0]),
    ]
    assert both.forwards_used.tolist() == [2 + int(second.forwards_used[1]), 2, 2 + int(second.forwards_used[0])]


@pytest.mark.parametrize("name", ATTACKS)
def test_starts_reach_the_first_try_of_every_attack(name: str) -> None:
    _, logits_of = linear(5)
    seen: list[Tensor] = []

    def watched(pixels: Tensor, places: Tensor) -> Tensor:
        seen.append(pixels.detach().clone())
        return logits_of(pixels, places)

    x = images(2)
    clean = logits_of(x, torch.arange(2))
    starts, threats = x + 0.005, [ThreatModel(eps=0.01)] * 2
    labels = clean.argmax(dim=1)
    ATTACKS[name](watched, x, labels, threats, [Budget(steps=1)] * 2, range(2), clean_logits=clean, starts=starts)
    torch.testing.assert_close(seen[0], starts)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_empty_batch_is_no_mistake(name: str) -> None:
    _, logits_of = linear(5)
    none = torch.zeros(0, dtype=torch.int64)
    found = ATTACKS[name](logits_of, images(0), none, [], [], [], clean_logits=torch.zeros(0, 5))
    assert found.pixels.shape == (0, *SHAPE)


def test_cross_entropy_and_margin_are_the_same_loss_for_two_classes() -> None:
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    labels, rows = torch.tensor([0, 1, 0, 1, 1]), torch.arange(5)
    torch.testing.assert_close(cross_entropy_loss(labels)(logits, rows), margin_loss(labels)(logits, rows))
