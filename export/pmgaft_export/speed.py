"""How many images a second each format encodes on this machine, and which one is the quickest."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from .runtime import Encode
from .sample import sample_pixels

BATCHES = (1, 16)
ROUNDS = 3
_SECONDS = 0.3  # of one format in one round, at least

Rates = dict[str, dict[int, float]]


def measure_speed(encoders: Mapping[str, Encode], size: tuple[int, int]) -> Rates:
    """Images a second of each encoder at each batch size, the best of several rounds.

    Encoders take turns inside a round, so that all feel the same noise.  size: (H, W) of the pixels.
    """
    rates: Rates = {name: {} for name in encoders}
    for batch in BATCHES:
        pixels = sample_pixels(batch, size, seed=0)
        for encode in encoders.values():
            for _ in range(2):  # compiled code is made, or tuned, in the first calls
                encode(pixels)
        for _ in range(ROUNDS):
            for name, encode in encoders.items():
                rates[name][batch] = max(rates[name].get(batch, 0.0), _rate(encode, pixels))
    return rates


def quickest(rates: Rates) -> str:
    """The encoder with the highest geometric mean of its rates: a lone image counts as much as a batch."""
    return max(rates, key=lambda name: math.prod(rates[name].values()))


def _rate(encode: Encode, pixels: torch.Tensor) -> float:
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < _SECONDS:
        encode(pixels)
        calls += 1
    return calls * len(pixels) / (time.perf_counter() - start)
