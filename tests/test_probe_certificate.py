"""The certificate by randomised smoothing: its bound, its radius, and what it refuses to claim."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from pmgaft.errors import InputError
from pmgaft.probe import NoisyFeatures, certify, noisy_features
from pmgaft.probe.certificate import binomial_lower_bound


@pytest.mark.parametrize(
    ("count", "draws", "bound", "radius"),
    [
        (100, 100, 0.933254, 1.5005),
        (900, 1000, 0.867464, 1.1145),
        (990, 1000, 0.976036, 1.9780),
        (1000, 1000, 0.993116, 2.4633),
        (9900, 10000, 0.986531, 2.2124),
        (99000, 100000, 0.988989, 2.2900),
        (100000, 100000, 0.999931, 3.8115),
    ],
)
def test_the_bound_is_clopper_and_pearsons(count: int, draws: int, bound: float, radius: float) -> None:
    found = binomial_lower_bound(count, draws, 0.001)
    assert found == pytest.approx(bound, abs=2e-6)
    assert NormalDist().inv_cdf(found) == pytest.approx(radius, abs=1e-4)


def test_the_bound_of_none_and_of_all_is_the_closed_form() -> None:
    assert binomial_lower_bound(0, 50, 0.01) == 0
    assert binomial_lower_bound(50, 50, 0.01) == pytest.approx(0.01 ** (1 / 50), rel=1e-9)


def two_way(x: Tensor) -> Tensor:
    """A linear classifier as unit features: on which side of the plane x_0 = 0.5 the image lies."""
    side = torch.where(x.flatten(1)[:, :1] > 0.5, 1.0, -1.0)
    return torch.cat([side, torch.zeros_like(side)], dim=1)


TEXTS = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])


def image(value: float) -> Tensor:
    pixels = torch.full((3, 4, 4), 0.5)
    pixels[0, 0, 0] = value
    return pixels


def test_a_half_spaces_radius_is_approached_and_never_passed() -> None:
    """The smoothed linear classifier's true radius is the distance to the plane, 0.3."""
    for seed in range(5):
        found = certify(noisy_features(two_way, image(0.8), sigma=0.25, draws=4000, seed=seed), TEXTS)
        assert found.index == 0
        assert 0.25 < found.radius_l2 <= 0.3
        assert found.radius_linf == pytest.approx(found.radius_l2 / math.sqrt(48))


def test_near_the_boundary_it_abstains() -> None:
    found = certify(noisy_features(two_way, image(0.5001), sigma=0.25, draws=200), TEXTS)
    assert found.index is None
    assert found.radius_l2 == 0


def test_draws_that_choose_are_never_those_that_count() -> None:
    noisy = noisy_features(two_way, image(0.6), sigma=0.25, selection=50, draws=300, seed=1)
    assert (len(noisy.selection), len(noisy.counting)) == (50, 300)
    seen = noisy_features(lambda x: x.flatten(1), image(0.6), sigma=0.25, selection=50, draws=300, seed=1)
    assert float(torch.cdist(seen.selection, seen.counting).min()) > 0.1
    other = NoisyFeatures(selection=-noisy.selection, counting=noisy.counting, sigma=0.25, seed=1, size=48)
    assert certify(other, TEXTS).index is None  # the selection chose wrongly, and the count does not follow it
    assert certify(noisy, TEXTS).index == 0


def test_features_are_computed_once_for_any_label_list() -> None:
    asked = 0

    def counting(x: Tensor) -> Tensor:
        nonlocal asked
        asked += len(x)
        return two_way(x)

    noisy = noisy_features(counting, image(0.8), sigma=0.25, selection=10, draws=90, batch_size=32)
    assert asked == 100
    assert certify(noisy, TEXTS).index == 0
    assert certify(noisy, TEXTS.flip(0)).index == 1
    assert asked == 100


def test_groups_count_as_one_answer_and_several_lists_share_the_confidence() -> None:
    texts = torch.tensor([[-1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])

    def undecided(x: Tensor) -> Tensor:
        wobble = torch.where(x.flatten(1)[:, 1:2] > 0.5, 1.0, -1.0)
        return torch.cat([two_way(x)[:, :1], wobble], dim=1)

    noisy = noisy_features(undecided, image(0.9), sigma=0.25, draws=500)
    assert certify(noisy, texts).index is None
    grouped = certify(noisy, texts, groups=((1, 2),))
    assert grouped.index == 1
    assert certify(noisy, texts, groups=((1, 2),), lists=10).radius_l2 < grouped.radius_l2


def test_noise_is_reproducible_and_not_cut_to_the_pixel_range() -> None:
    seen: list[Tensor] = []

    def watching(x: Tensor) -> Tensor:
        seen.append(x)
        return two_way(x)

    for _ in range(2):
        noisy_features(watching, image(0.9), sigma=0.5, selection=5, draws=20, seed=3)
    assert torch.equal(seen[0], seen[1])
    assert float(seen[0].min()) < 0
    assert float(seen[0].max()) > 1
    assert float((seen[0] - image(0.9)).std()) == pytest.approx(0.5, rel=0.1)


def test_impossible_noise_is_refused() -> None:
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError):
            noisy_features(two_way, image(0.5), sigma=sigma)
    with pytest.raises(InputError):
        noisy_features(two_way, image(0.5), sigma=0.1, draws=0)
