"""How far a run is, and what follows from it: learning rate and attack radius are functions of progress in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How long a run lasts: a number of optimiser steps, a number of minutes, or whichever ends first."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over after so many steps and seconds, in [0, 1]."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))


def rate(progress: float, *, warmup: float, shape: str) -> float:
    """The factor on the learning rate: linear from 0 over `warmup`, then constant, or a cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    if shape == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def ramp(progress: float, share: float) -> float:
    """The factor on eps: linear from 0 to 1 over this share of the run, then 1."""
    return min(1.0, progress / share) if share else 1.0
