"""Attacks against models whose best adversarial image is known in closed form, and the habits no attack may lose."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pmgaft.attacks import (
    Adversarial,
    Budget,
    LogitsOf,
    Loss,
    apgd,
    cross_entropy_loss,
    dlr_loss,
    margin_loss,
    misclassified,
    pgd,
)
from pmgaft.errors import InputError, ThreatError
from pmgaft.threat import ThreatModel

SHAPE = (3, 4, 5)
LOSSES = {"cross entropy": cross_entropy_loss, "margin": margin_loss}
Attack = Callable[..., Adversarial]
CLIMBERS: dict[str, Attack] = {"pgd": pgd, "pgd-last": functools.partial(pgd, keep="last"), "apgd": apgd}
JUDGING: dict[str, Attack] = {"pgd": pgd, "apgd": apgd}

every_climber = pytest.mark.parametrize("attack", CLIMBERS.values(), ids=CLIMBERS)
every_judging_climber = pytest.mark.parametrize("attack", JUDGING.values(), ids=JUDGING)


def linear(classes: int = 2, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, LogitsOf]:
    """A linear classifier: weights [K, 3, H, W] and its logits."""
    weights = scale * torch.randn(classes, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return weights, lambda x, rows: torch.einsum("nchw,kchw->nk", x, weights)


def images(count: int, seed: int = 1, low: float = 0.3, high: float = 0.7) -> Tensor:
    return low + (high - low) * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def linf(eps: float) -> ThreatModel:
    return ThreatModel(norm="linf", eps=eps)


class Deep(nn.Module):
    """Small, nonlinear, with everything an attack could disturb: BatchNorm, dropout, parameters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 4)
            )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 10 * self.net(x)
        return logits


@every_climber
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_an_attack_reaches_the_largest_margin_drop_of_a_linear_model(
    norm: Literal["linf", "l2"], dual: int, loss: Callable[[Tensor], Loss], attack: Attack
) -> None:
    weights, logits_of = linear()
    x, labels, eps = images(4), torch.zeros(4, dtype=torch.int64), 0.05
    budget = Budget(steps=20, random_start=norm == "linf")  # in l2, a start elsewhere is forgotten only bit by bit
    found = attack(logits_of, x, loss(labels), [ThreatModel(norm=norm, eps=eps)] * 4, [budget] * 4, range(4))
    before, after = (logits_of(pixels, labels) @ torch.tensor([1.0, -1.0]) for pixels in (x, found.pixels))
    difference = (weights[0] - weights[1]).flatten()
    torch.testing.assert_close(
        before - after, torch.full((4,), eps * float(difference.norm(p=dual))), rtol=1e-4, atol=0
    )


@every_climber
def test_an_attack_reaches_the_corner_of_the_pixel_box_where_that_is_nearer_than_eps(attack: Attack) -> None:
    weights, logits_of = linear()
    x, labels = torch.ones(1, *SHAPE), torch.zeros(1, dtype=torch.int64)
    found = attack(logits_of, x, margin_loss(labels), [linf(0.1)], [Budget(steps=20)], [0])
    best = torch.where(weights[1] - weights[0] > 0, 1.0, 0.9)
    torch.testing.assert_close(found.pixels[0], best)


@settings(max_examples=40, deadline=None)
@given(
    eps=st.floats(0, 1),
    norm=st.sampled_from(["linf", "l2"]),
    step=st.one_of(st.none(), st.floats(1e-3, 2)),
    steps=st.integers(1, 4),
    low=st.floats(0, 0.5),
    attack=st.sampled_from(list(CLIMBERS.values())),
    seed=st.integers(0, 2**62),
)
def test_no_attack_leaves_its_ball_or_the_pixel_range(
    eps: float,
    norm: Literal["linf", "l2"],
    step: float | None,
    steps: int,
    low: float,
    attack: Attack,
    seed: int,
) -> None:
    x, labels = images(2, seed=3, low=low, high=1.0), torch.tensor([0, 1])
    _, logits_of = linear()
    threats, budgets = [ThreatModel(norm=norm, eps=eps)] * 2, [Budget(steps=steps, step_size=step)] * 2
    found = attack(logits_of, x, cross_entropy_loss(labels), threats, budgets, [seed, seed])
    delta = (found.pixels - x).flatten(1)
    distance = delta.abs().amax(dim=1) if norm == "linf" else delta.norm(dim=1)
    assert float(distance.max()) <= eps + 1e-6
    assert float(found.pixels.min()) >= 0
    assert float(found.pixels.max()) <= 1


@every_climber
def test_eps_zero_returns_the_image_itself(attack: Attack) -> None:
    _, logits_of = linear()
    x, labels = images(3), torch.zeros(3, dtype=torch.int64)
    for norm in ("linf", "l2"):
        threat = ThreatModel(norm=norm, eps=0.0)
        found = attack(logits_of, x, margin_loss(labels), [threat] * 3, [Budget()] * 3, range(3))
        assert torch.equal(found.pixels, x)


@pytest.mark.parametrize("name", CLIMBERS)
def test_a_row_is_what_it_would_be_alone_whoever_its_neighbours_are(name: str) -> None:
    """Confident neighbours drown a shared mean loss; other budgets, norms and early leavers shift a careless batch."""
    model = Deep().eval()
    x = images(64, seed=5)
    labels = model(x).argmax(dim=1)
    labels[1] = (labels[1] + 1) % 4  # broken from the start: leaves at once

    def attack(rows: list[int]) -> Tensor:
        confidence = torch.tensor([1.0 if row < 2 else 1000.0 for row in rows])
        threats = [linf(0.02) if row % 3 else ThreatModel(norm="l2", eps=0.1) for row in rows]
        budgets = [Budget(steps=3 + row % 4, restarts=1 if name == "pgd-last" else 1 + row % 2) for row in rows]
        return CLIMBERS[name](
            lambda pixels, places: confidence[places, None] * model(pixels),
            x[rows],
            cross_entropy_loss(labels[rows]),
            threats,
            budgets,
            seeds=rows,
            success=misclassified(labels[rows]),
        ).pixels[0]

    for row in (0, 1, 2, 5):
        others = [other for other in range(64) if other != row]
        alone = attack([row])
        torch.testing.assert_close(attack([row, others[0]]), alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(attack([row, *others]), alone, rtol=0, atol=1e-6)


def test_the_order_of_a_batch_is_the_order_of_its_result() -> None:
    model = Deep().eval()
    x, order = images(6, seed=2), torch.tensor([4, 2, 0, 5, 1, 3])
    labels = model(x).argmax(dim=1)

    def attack(rows: Tensor) -> Tensor:
        size = len(rows)
        loss = cross_entropy_loss(labels[rows])
        return pgd(lambda p, _: model(p), x[rows], loss, [linf(0.01)] * size, [Budget()] * size, rows.tolist()).pixels

    torch.testing.assert_close(attack(order), attack(torch.arange(6))[order], rtol=0, atol=1e-6)


@every_climber
def test_an_attack_touches_no_gradient_no_mode_and_no_global_random_state(attack: Attack) -> None:
    model = Deep().eval()
    model.net[4].train()  # a mode like no other, which must be found as it was left
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    x = images(3).requires_grad_()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    setattr(model.net[4], "p", 0.0)  # noqa: B010, mypy takes p for a module; dropout itself would draw from the global generator
    state = torch.get_rng_state()
    attack(
        lambda p, _: model(p),
        x,
        cross_entropy_loss(torch.tensor([0, 1, 2])),
        [linf(0.1)] * 3,
        [Budget(steps=3)] * 3,
        range(3),
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(bool((parameter.grad == 7.0).all()) for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert x.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_climber
def test_gradients_are_float32_whatever_autocast_or_mode_surrounds(attack: Attack) -> None:
    model = Deep().eval()
    seen: list[torch.dtype] = []

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        logits: Tensor = model(x)
        seen.append(logits.dtype)
        return logits

    x, labels = images(2), torch.zeros(2, dtype=torch.int64)
    arguments = (cross_entropy_loss(labels), [linf(0.05)] * 2, [Budget(steps=3)] * 2, range(2))
    plain = attack(logits_of, x, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inside = attack(logits_of, x, *arguments)
    with torch.inference_mode():
        inferred = attack(logits_of, x, *arguments)
    assert set(seen) == {torch.float32}
    assert torch.equal(plain.pixels, inside.pixels)
    assert torch.equal(plain.pixels, inferred.pixels)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
@every_judging_climber
def test_a_very_confident_model_still_shows_where_to_go(scale: float, attack: Attack) -> None:
    """In float32 the gradient of the plain cross entropy is exactly zero here, and the attack would stand still."""
    _, logits_of = linear(scale=scale)
    x = images(1)
    label = logits_of(x, torch.zeros(1)).argmax(dim=1)
    found = attack(logits_of, x, cross_entropy_loss(label), [linf(0.3)], [Budget()], [0], success=misclassified(label))
    assert bool(found.success[0])
    assert float(found.zero_gradient_share[0]) == 0


def test_log_odds_rise_and_fall_with_the_cross_entropy() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    labels, rows = torch.arange(50) % 7, torch.arange(50)
    odds = cross_entropy_loss(labels)(logits, rows)
    entropy = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(nn.functional.softplus(odds), entropy)
    (of_odds,) = torch.autograd.grad(odds.sum(), logits, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    share = odds.detach().sigmoid()[:, None]
    torch.testing.assert_close(share * of_odds, of_entropy)


def test_classes_that_a_row_lacks_play_no_part() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 1.0, 3.0]], requires_grad=True)
    labels, rows = torch.tensor([0, 1]), torch.arange(2)
    for loss, expected in (
        (cross_entropy_loss, [-1.0, math.log1p(math.exp(3.0)) - 1]),
        (margin_loss, [-1.0, 2.0]),
    ):
        values = loss(labels)(logits, rows)
        torch.testing.assert_close(values, torch.tensor(expected))
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert float(gradient[0, 2]) == 0
        assert bool(gradient.isfinite().all())


def test_the_best_point_is_kept_not_the_last() -> None:
    """On this loss, a step that is far too long jumps back and forth; the last iterate is worse than the best."""
    peak = 0.5

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        height = -((x - peak) ** 2).sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(height), height], dim=1)

    x, labels = torch.full((1, *SHAPE), 0.45), torch.zeros(1, dtype=torch.int64)
    budget = Budget(steps=4, step_size=0.08, random_start=False)
    best, last = (
        pgd(logits_of, x, margin_loss(labels), [linf(0.3)], [budget], [0], keep=keep).pixels
        for keep in ("best", "last")
    )
    assert float((best - peak).abs().max()) < float((last - peak).abs().max())


@every_judging_climber
def test_rows_leave_when_broken_and_when_out_of_steps_and_costs_are_counted_by_row(attack: Attack) -> None:
    seen: list[list[int]] = []
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return linear_logits(x, rows)

    x = images(3)
    clean = linear_logits(x, torch.arange(3)).argmax(dim=1)
    labels = torch.tensor([1 - int(clean[0]), int(clean[1]), int(clean[2])])
    budgets = [Budget(steps=5), Budget(steps=1), Budget(steps=2)]
    found = attack(
        logits_of, x, margin_loss(labels), [linf(1e-4)] * 3, budgets, range(3), success=misclassified(labels)
    )
    assert seen == [[0, 1, 2], [1, 2], [2]]
    assert found.success.tolist() == [True, False, False]
    assert found.gradients_used.tolist() == [0, 1, 2]
    assert found.forwards_used.tolist() == [1, 2, 3]


def test_the_last_iterate_costs_its_steps_and_no_more() -> None:
    calls = []
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        calls.append((len(rows), x.requires_grad))
        return linear_logits(x, rows)

    x, labels = images(4), torch.zeros(4, dtype=torch.int64)
    found = pgd(logits_of, x, cross_entropy_loss(labels), [linf(0.1)] * 4, [Budget(steps=2)] * 4, range(4), keep="last")
    assert calls == [(4, True)] * 2
    assert found.gradients_used.tolist() == [2] * 4


@every_judging_climber
def test_restarts_try_other_starts_and_never_find_less(attack: Attack) -> None:
    model = Deep().eval()
    x = images(8, seed=9)
    labels = model(x).argmax(dim=1)
    losses = [
        attack(
            lambda p, _: model(p),
            x,
            margin_loss(labels),
            [linf(0.01)] * 8,
            [Budget(steps=1, restarts=restarts)] * 8,
            range(8),
        ).loss
        for restarts in (1, 4)
    ]
    assert bool((losses[1] >= losses[0]).all())
    assert bool((losses[1] > losses[0]).any())


@every_climber
def test_a_row_without_finite_gradients_says_so_and_its_neighbour_does_not_care(attack: Attack) -> None:
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        return linear_logits(x, rows) * torch.tensor([torch.nan, 1.0])[rows, None]

    x, labels = images(2), torch.zeros(2, dtype=torch.int64)
    found = attack(
        logits_of,
        x,
        cross_entropy_loss(labels),
        [ThreatModel(norm="l2", eps=0.1), linf(0.1)],
        [Budget()] * 2,
        range(2),
        success=misclassified(labels),
    )
    assert found.finite.tolist() == [False, True]
    assert not bool(found.success[0])
    assert bool(found.pixels.isfinite().all())


@every_climber
def test_the_share_of_zero_gradient_entries_is_reported(attack: Attack) -> None:
    weights, _ = linear()
    weights[:, 0] = 0  # a third of the pixels never matters

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", x, weights)

    found = attack(logits_of, images(1), margin_loss(torch.tensor([0])), [linf(0.1)], [Budget()], [0])
    torch.testing.assert_close(found.zero_gradient_share, torch.tensor([1 / 3]))


@every_judging_climber
def test_rows_out_of_time_leave_with_what_was_found(attack: Attack) -> None:
    _, logits_of = linear()
    x, labels = images(2), torch.zeros(2, dtype=torch.int64)
    found = attack(
        logits_of,
        x,
        margin_loss(labels),
        [linf(1e-4)] * 2,
        [Budget(steps=3, restarts=2)] * 2,
        range(2),
        expired=lambda rows: rows == 0,
    )
    assert found.cut_short.tolist() == [True, False]
    assert found.gradients_used.tolist() == [0, 6]


@every_judging_climber
def test_images_outside_the_pixel_range_are_refused(attack: Attack) -> None:
    _, logits_of = linear()
    loss = margin_loss(torch.tensor([0]))
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            attack(logits_of, torch.full((1, *SHAPE), bad), loss, [linf(0.1)], [Budget()], [0])


@every_climber
def test_an_empty_batch_gives_an_empty_answer(attack: Attack) -> None:
    _, logits_of = linear()
    found = attack(logits_of, images(0), margin_loss(torch.zeros(0, dtype=torch.int64)), [], [], [])
    assert found.pixels.shape == (0, *SHAPE)


@pytest.mark.parametrize(
    ("budget", "code"),
    [
        ({"steps": 0}, "steps_invalid"),
        ({"restarts": 0}, "restarts_invalid"),
        ({"step_size": 0.0}, "step_size_invalid"),
        ({"step_size": math.nan}, "step_size_invalid"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget: dict[str, float], code: str) -> None:
    with pytest.raises(ThreatError) as caught:
        Budget(**budget)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_several_restarts_need_the_best_to_be_kept() -> None:
    _, logits_of = linear()
    with pytest.raises(ThreatError):
        pgd(
            logits_of,
            images(1),
            margin_loss(torch.tensor([0])),
            [linf(0.1)],
            [Budget(restarts=2)],
            [0],
            keep="last",
        )


@pytest.mark.parametrize("norms", [("linf", "linf"), ("linf", "l2")])
@pytest.mark.parametrize("steps", [(2, 2), (2, 3)], ids=["equal budgets", "unequal budgets"])
def test_the_last_iterate_is_found_without_waiting_for_the_device(
    norms: tuple[Literal["linf", "l2"], ...], steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, whose tensors have no values, whatever needs a value on the host fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device knows none
    weights = torch.empty(3, *SHAPE, device="meta")
    found = pgd(
        lambda x, rows: torch.einsum("nchw,kchw->nk", x, weights),
        torch.empty(2, *SHAPE, device="meta"),
        cross_entropy_loss(torch.empty(2, dtype=torch.int64, device="meta")),
        [ThreatModel(norm=norm, eps=0.1) for norm in norms],
        [Budget(steps=count) for count in steps],
        range(2),
        keep="last",
    )
    assert found.pixels.device.type == "meta"
    assert found.pixels.shape == (2, *SHAPE)


@every_judging_climber
def test_starts_replace_the_first_restart_s_noise_and_are_projected(attack: Attack) -> None:
    seen: list[Tensor] = []
    _, linear_logits = linear()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return linear_logits(x, rows)

    x, eps = images(2), 0.05
    starts = x + torch.tensor([0.02, 0.5]).reshape(2, 1, 1, 1)
    budget = Budget(steps=1, restarts=2)
    attack(
        logits_of,
        x,
        margin_loss(torch.zeros(2, dtype=torch.int64)),
        [linf(eps)] * 2,
        [budget] * 2,
        [0, 1],
        starts=starts,
    )
    torch.testing.assert_close(seen[0][0], x[0] + 0.02)
    torch.testing.assert_close(seen[0][1], x[1] + eps)
    assert float((seen[2] - seen[0]).abs().amax(dim=(1, 2, 3)).min()) > 0.01  # the second restart is a random one
    with pytest.raises(ValueError, match="starts"):
        attack(
            logits_of,
            x,
            margin_loss(torch.zeros(2, dtype=torch.int64)),
            [linf(eps)] * 2,
            [budget] * 2,
            [0, 1],
            starts=x[:1],
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_climber
def test_logits_of_a_half_precision_model_are_compared_in_float32(dtype: torch.dtype, attack: Attack) -> None:
    """Losses of half-precision logits would round; the gradient comes back as float32 too."""
    weights, _ = linear(3)
    seen: list[torch.dtype] = []

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return margin_loss(torch.zeros(2, dtype=torch.int64))(logits, rows)

    found = attack(
        lambda x, rows: torch.einsum("nchw,kchw->nk", x.to(dtype), weights.to(dtype)),
        images(2),
        loss,
        [linf(0.05)] * 2,
        [Budget(steps=3)] * 2,
        range(2),
    )
    assert set(seen) == {torch.float32}
    assert found.pixels.dtype == torch.float32
    assert found.loss.dtype == torch.float32


def test_dlr_is_the_difference_of_logits_ratio_whatever_scale_and_offset() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -2.0], [3.0, 1.0, 0.0, -2.0], [3.0, 1.0, 0.0, -torch.inf]])
    rows = torch.arange(3)
    for scaled in (logits, 100 * logits, logits + 7):
        values = dlr_loss(torch.tensor([0, 1, 0]))(scaled, rows)
        torch.testing.assert_close(values, torch.tensor([-2 / 3, 2 / 3, -2 / 3]))


@every_climber
def test_a_large_batch_does_not_drown_the_gradients_of_a_half_precision_model(attack: Attack) -> None:
    """Averaged over 64 rows, gradients of 1e-6 are below the smallest number of float16, and nothing would move."""
    weights, _ = linear(2)
    tiny = (5e-7 * weights.sign()).half()

    def logits_of(x: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", x.half(), tiny)

    x, labels = images(64), torch.zeros(64, dtype=torch.int64)
    budget = Budget(steps=2, random_start=False)
    found = attack(logits_of, x, margin_loss(labels), [linf(0.1)] * 64, [budget] * 64, range(64))
    expected = float((weights[1].sign() != weights[0].sign()).float().mean())
    torch.testing.assert_close(1 - found.zero_gradient_share, torch.full((64,), expected))
