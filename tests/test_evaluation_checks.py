"""The self-checks: silent on a sound attack of a sound model, and each fires where something is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pmgaft.attacks import Adversarial, misclassified, pgd
from pmgaft.attacks.menu import ATTACKS
from pmgaft.evaluation.checks import (
    Check,
    Group,
    checks_of_attacks,
    checks_of_outcomes,
    sample_rows,
    sample_size,
    served_alike,
)
from pmgaft.evaluation.protocol import Protocol, parse_attacks
from pmgaft.evaluation.run import LogitsOf, judge_images
from pmgaft.threat import Norm, ThreatModel

CLASSES, IMAGES, SIDE = 5, 48, 8


def linear(x: Tensor) -> Tensor:
    weights = torch.randn(CLASSES, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(1))
    return (x - 0.5).flatten(1) @ weights.T


def pictures() -> Tensor:
    noise = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return (0.5 + 0.1 * noise).clamp(0, 1)


def checked(
    model: LogitsOf = linear, *, eps: float = 1 / 255, norm: Norm = "linf", attack: str = "pgd-ce:10"
) -> dict[str, Check]:
    """The checks, by name, of an attack on all images; the labels are what the sound model says, but for some."""
    pixels = pictures()
    labels = linear(pixels).argmax(dim=1)
    labels[::12] = (labels[::12] + 1) % CLASSES
    protocol = Protocol(attacks=parse_attacks([attack]), threats=(ThreatModel(norm=norm, eps=eps),), seed=3)
    outcomes = judge_images(model, pixels, labels, range(IMAGES), protocol, 16)
    rows = sample_rows(outcomes, 24)
    group = Group(logits_of=model, pixels=pixels[rows], labels=labels[rows], numbers=rows.tolist(), place=rows)
    checks = checks_of_outcomes(outcomes, CLASSES) + checks_of_attacks([group], outcomes, protocol, 16)
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.passed is False}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmgaft.evaluation.checks.QUERIES", 60)


@pytest.mark.parametrize(
    ("attack", "norm", "eps"),
    [
        ("pgd-ce:10", "linf", 1 / 255),
        ("pgd-margin:10", "l2", 0.05),
        ("apgd-ce:20", "linf", 1 / 255),
        ("square:100", "linf", 1 / 255),
    ],
)
def test_a_sound_attack_on_a_sound_model_fails_no_check(attack: str, norm: Norm, eps: float) -> None:
    checks = checked(norm=norm, eps=eps, attack=attack)
    assert failed(checks) == set()
    assert checks["monotone"].figures["standing"][0] == 24
    assert checks["monotone"].figures["standing"][-1] == 0


def test_two_classes_and_a_single_attack_with_no_gradient_are_no_reason_to_fail() -> None:
    checks = checked(lambda x: linear(x)[:, :2], attack="square:50")
    assert "ce_margin" not in failed(checks)
    assert checks["zero_gradients"].passed is None


# --- models broken on purpose


def test_a_constant_answer_is_noticed() -> None:
    checks = checked(lambda x: torch.eye(CLASSES)[0].expand(len(x), -1) + 0 * x.sum())
    assert {"commonest_answer", "huge_eps", "zero_gradients"} <= failed(checks)
    assert "100 % of all clean answers" in checks["commonest_answer"].said


def test_a_rounding_to_eight_bits_in_front_is_noticed() -> None:
    checks = checked(lambda x: linear((x * 255).round() / 255))
    assert {"zero_gradients", "huge_eps", "square"} <= failed(checks)


def test_an_input_that_is_cut_off_is_noticed() -> None:
    assert {"zero_gradients", "huge_eps", "square"} <= failed(checked(lambda x: linear(x.detach())))


def test_gradients_that_point_the_wrong_way_are_noticed() -> None:
    assert {"huge_eps", "square"} <= failed(checked(lambda x: linear(2 * x.detach() - x)))


def test_logits_that_are_no_numbers_are_noticed() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.where(x.mean(dim=(1, 2, 3))[:, None] > 0.505, torch.nan, linear(x))

    assert "finite" in failed(checked(model))


def test_a_model_that_answers_by_chance_is_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    assert "eps_zero" in failed(checked(lambda x: linear(x) + 3 * torch.randn(len(x), CLASSES, generator=generator)))


# --- attacks broken on purpose


def with_attack(name: str, attack: Callable[..., Adversarial], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmgaft.evaluation.run.ATTACKS", dict(ATTACKS) | {name: attack})


def test_a_loss_that_saturates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(logits_of: Any, pixels: Tensor, labels: Tensor, *rest: Any, **_: Any) -> Adversarial:
        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")

        return pgd(logits_of, pixels, loss, *rest, success=misclassified(labels))

    with_attack("pgd-ce", saturating, monkeypatch)
    checks = checked(lambda x: 1000 * linear(x))
    assert {"zero_gradients", "ce_margin"} <= failed(checks)
    assert "ce_margin" not in failed(checked())


def test_an_attack_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any, **options: Any) -> Adversarial:
        return replace(ATTACKS["pgd-ce"](*args, **options), pixels=args[1])

    with_attack("pgd-ce", nothing, monkeypatch)
    assert {"huge_eps", "square", "ce_margin"} <= failed(checked())


def test_an_attack_that_leaves_its_ball_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def far(*args: Any, **options: Any) -> Adversarial:
        return replace(ATTACKS["pgd-ce"](*args, **options), pixels=1 - args[1])

    with_attack("pgd-ce", far, monkeypatch)
    assert {"inside", "eps_zero"} <= failed(checked())


def test_an_attack_that_only_works_in_small_balls_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timid(*args: Any, **options: Any) -> Adversarial:
        found = ATTACKS["pgd-ce"](*args, **options)
        return found if args[3][0].eps < 3 / 255 else replace(found, pixels=args[1])

    with_attack("pgd-ce", timid, monkeypatch)
    assert {"monotone", "huge_eps"} <= failed(checked())


# --- the sample, and the resize


def test_a_resize_that_answers_otherwise_than_the_served_one_is_noticed() -> None:
    assert served_alike(torch.ones(20, dtype=torch.bool)).passed
    assert served_alike(torch.arange(20) > 0).passed
    assert served_alike(torch.arange(20) > 1).passed is False


def test_the_sample_grows_with_the_set_and_holds_only_what_is_right() -> None:
    assert [sample_size(n) for n in (10, 256, 800, 10_000)] == [16, 16, 50, 64]
    pixels = pictures()
    labels = linear(pixels).argmax(dim=1)
    labels[::2] += 1
    outcomes = judge_images(linear, pixels, labels, range(IMAGES), Protocol(), 16)
    assert sample_rows(outcomes, 100).tolist() == [*range(1, IMAGES, 2)]
    assert sample_rows(outcomes, 4).tolist() == [1, 17, 31, 47]
    assert len(sample_rows(outcomes, 0)) == 0
