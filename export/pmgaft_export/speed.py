"""How many images a second each format encodes on this machine, and which one is the quickest."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from torch import Tensor

from .runtime import Encode
from .sample import sample_pixels

BATCHES = (1, 16)
ROUNDS = 5  # at least
_SECONDS = 1.0  # for each encoder at each batch size, at least

Rates = dict[str, dict[int, float]]


def measure_speed(encoders: Mapping[str, Encode], size: tuple[int, int]) -> Rates:
    """Images a second of each encoder at each batch size, by its shortest call, which other work disturbed least.

    Encoders take turns, call by call, so that all feel the same noise.  size: (H, W) of the pixels.
    """
    rates: Rates = {name: {} for name in encoders}
    for batch in BATCHES:
        pixels = sample_pixels(batch, size, seed=0)
        for encode in encoders.values():
            for _ in range(2):  # compiled code is made, or tuned, in the first calls
                encode(pixels)
        shortest = dict.fromkeys(encoders, math.inf)
        rounds, start = 0, time.perf_counter()
        while rounds < ROUNDS or time.perf_counter() - start < _SECONDS * len(encoders):
            for name, encode in encoders.items():
                shortest[name] = min(shortest[name], _seconds(encode, pixels))
            rounds += 1
        for name, seconds in shortest.items():
            rates[name][batch] = batch / seconds
    return rates


def quickest(rates: Rates) -> str:
    """The encoder with the highest geometric mean of its rates: a lone image counts as much as a batch."""
    return max(rates, key=lambda name: math.prod(rates[name].values()))


def _seconds(encode: Encode, pixels: Tensor) -> float:
    start = time.perf_counter()
    encode(pixels)
    return time.perf_counter() - start
