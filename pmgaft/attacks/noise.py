"""The random numbers of attacks: a row's are a function of (seed, stream, element) alone.

A counter hash instead of a generator: no state, no order of drawing, no neighbour can matter, and all rows of a batch
take the same few kernels, on a CPU as on a GPU. Source: the SplitMix64 generator of Steele, Lea and Flood 2014 (Fast
splittable pseudorandom number generators, OOPSLA, section 5), finaliser variant 13 of Stafford, keyed by a hash of
the seed. Its arithmetic is modulo 2^64, which int64 tensors keep, wrapped.
Letters: n rows, d elements of an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_STREAM = 0xD1342543DE82EF95


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Seeds, any integers, modulo 2^64: int64 [n] on the device, which nobody waits for."""
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64).to(device, non_blocking=True)


def hashed_bits(seeds: Tensor, stream: int, count: int) -> Tensor:
    """64 bits per row and element: int64 [n, count].

    seeds: int64 [n]. stream: keeps one purpose or restart of a row apart from another.
    """
    keys = _mix(seeds + _signed(stream * _STREAM))
    counters = torch.arange(1, count + 1, device=seeds.device) * _signed(_GOLDEN)
    return _mix(keys[:, None] + counters)


def uniform(bits: Tensor) -> Tensor:
    """Uniform in (-1, 1), symmetric, never 0: float32, odd multiples of 2^-24, from the upper 25 bits."""
    return (bits >> 39).bitwise_or_(1).float().mul_(2.0**-24)


def normal(bits: Tensor) -> Tensor:
    """Standard normal by Box and Muller 1958, up to 5.8 in size: float32. Radius by the upper bits, angle by the
    lower."""
    radius = uniform(bits).add_(1).mul_(0.5).log_().mul_(-2).sqrt_()
    return uniform(bits << 32).mul_(math.pi).cos_().mul_(radius)


def below(count: int, bits: Tensor) -> Tensor:
    """A whole number from 0 to count - 1, evenly but for one part in 2^32 / count: int64, from the upper 32 bits."""
    return (_shifted(bits, 32) * count) >> 32


def in_unit_ball(seeds: Tensor, stream: int, shape: Sequence[int], l2: Tensor | None) -> Tensor:
    """A point of each row's unit ball, uniformly: float32 [n, *shape].

    l2: bool [n], rows whose ball is l2, the others' being linf; None if there are none. In l2 the direction is a
    normal vector's and the radius U^(1/d), which makes the density even.
    """
    size = math.prod(shape)
    bits = hashed_bits(seeds, stream, size + 1)
    points = uniform(bits[:, :size])
    if l2 is not None:
        radius = uniform(bits[:, size:]).add_(1).mul_(0.5) ** (1 / max(size, 1))
        direction = torch.nn.functional.normalize(normal(bits[:, :size]), dim=1)
        points = torch.where(l2[:, None], direction * radius, points)
    return points.reshape(-1, *shape)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, element by element; z is written over."""
    z ^= _shifted(z, 30)
    z *= _signed(0xBF58476D1CE4E5B9)
    z ^= _shifted(z, 27)
    z *= _signed(0x94D049BB133111EB)
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own carries the sign along."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return (value + 2**63) % 2**64 - 2**63
