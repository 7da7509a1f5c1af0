"""The random numbers of attacks: evenly spread, and a function of seed, stream and element alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pmgaft.attacks.noise import hashed_bits, in_unit_ball, normal, seed_tensor, uniform

CPU = torch.device("cpu")
SHAPE = (3, 40, 50)


def bits(seeds: list[int], stream: int = 0, count: int = 6000) -> Tensor:
    return hashed_bits(seed_tensor(seeds, CPU), stream, count)


def finaliser(z: int) -> int:
    """SplitMix64's, in Python's unlimited integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**63 - 1, 2**64 + 5, -3])
def test_the_bits_are_those_of_splitmix64_with_a_hashed_seed(seed: int) -> None:
    key = finaliser((seed + 7 * 0xD1342543DE82EF95) % 2**64)
    expected = [finaliser((key + counter * 0x9E3779B97F4A7C15) % 2**64) for counter in (1, 2, 3)]
    assert [value % 2**64 for value in bits([seed], stream=7, count=3)[0].tolist()] == expected
    # the published first outputs of SplitMix64 from the state 1234567 vouch for the reference itself
    states = [1234567 + counter * 0x9E3779B97F4A7C15 for counter in (1, 2)]
    assert [finaliser(state % 2**64) for state in states] == [6457827717110365317, 3203168211198807973]


def test_every_bit_of_every_row_is_a_fair_coin() -> None:
    drawn = bits(list(range(50)))
    ones = torch.stack([((drawn >> place) & 1).float().mean(dim=1) for place in range(64)])
    deviations = (ones - 0.5) * 2 * math.sqrt(drawn.shape[1])
    assert float(deviations.abs().max()) < 5
    assert float(deviations.std()) == pytest.approx(1, abs=0.1)


def test_uniform_numbers_fill_their_interval_evenly() -> None:
    values = uniform(bits([3, 4], count=200_000))
    for row in values:
        counts = torch.histc(row, bins=100, min=-1, max=1)
        expected = len(row) / 100
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert 50 < chi_squared < 160  # 99 degrees of freedom: mean 99, deviation 14
    assert float(values.abs().max()) < 1
    assert float(values.abs().min()) > 0


def test_normal_numbers_have_the_moments_and_quantiles_of_a_normal_law() -> None:
    values = normal(bits([5], count=200_000))[0].double()
    root = math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 / root
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2) / root
    assert abs(float((values**3).mean())) < 4 * math.sqrt(15) / root
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96) / root
    for quantile in (-2.0, -1.0, 0.5, 1.5):
        below = 0.5 * (1 + math.erf(quantile / math.sqrt(2)))
        assert abs(float((values < quantile).double().mean()) - below) < 2 / root


def test_the_largest_and_smallest_bits_give_finite_numbers() -> None:
    extremes = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**39, -(2**39) - 1])
    assert bool((uniform(extremes).abs() < 1).all())
    assert bool(normal(extremes).isfinite().all())
    assert float(normal(extremes).abs().max()) < 6


def test_rows_streams_and_neighbouring_elements_are_uncorrelated() -> None:
    values = uniform(bits([0, 1, 2, 1000], count=50_000))
    other = uniform(bits([0, 1, 2, 1000], stream=1, count=50_000))
    correlations = torch.corrcoef(torch.cat([values, other, values.roll(1, dims=1)]))
    assert float((correlations - torch.eye(12)).abs().max()) < 5 / math.sqrt(50_000)


def test_a_row_depends_on_its_own_seed_and_stream_and_nothing_else() -> None:
    l2 = torch.tensor([True, False, True])
    together = in_unit_ball(seed_tensor([7, 8, 7], CPU), 2, SHAPE, l2)
    torch.testing.assert_close(in_unit_ball(seed_tensor([7], CPU), 2, SHAPE, l2[:1])[0], together[0])
    assert torch.equal(in_unit_ball(seed_tensor([8], CPU), 2, SHAPE, None)[0], together[1])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(in_unit_ball(seed_tensor([7], CPU), 3, SHAPE, l2[:1])[0], together[0])


def test_points_of_the_l2_ball_have_even_radii_and_no_preferred_direction() -> None:
    seeds, shape = seed_tensor(range(4000), CPU), (1, 2, 2)
    points = in_unit_ball(seeds, 0, shape, torch.ones(4000, dtype=torch.bool)).flatten(1)
    volumes = points.norm(dim=1) ** 4  # the share of the ball within this radius: uniform
    for share in (0.1, 0.5, 0.9):
        assert float((volumes < share).float().mean()) == pytest.approx(share, abs=0.03)
    assert float(volumes.max()) <= 1
    assert float(points.mean(dim=0).abs().max()) < 0.04
    assert float((points.T.cov() - torch.eye(4) / 6).abs().max()) < 0.02  # variance 1 / (d + 2) in each direction


def test_the_global_random_state_is_neither_read_nor_written() -> None:
    state = torch.get_rng_state()
    first = in_unit_ball(seed_tensor([0], CPU), 0, SHAPE, torch.ones(1, dtype=torch.bool))
    torch.rand(3)
    assert torch.equal(in_unit_ball(seed_tensor([0], CPU), 0, SHAPE, torch.ones(1, dtype=torch.bool)), first)
    torch.set_rng_state(state)
