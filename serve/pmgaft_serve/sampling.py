"""Probes of ordinary traffic: a random share of the answered images is attacked when nothing else is to be probed.

Nothing of an image is kept once it is counted, and nothing of it is logged.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from torch import Tensor

from pmgaft.probe import ProbeReport, ProbeSettings
from pmgaft.threat import ThreatModel, format_eps

from .metrics import VERDICTS, Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePolicy:
    """rate: in [0, 1], of the images that are answered without a probe. eps: linf radii, pixel units, ascending, that
    are told apart. queue: images that wait, at most; more are dropped. steps: of the attack in the largest ball.
    """

    rate: float = 0.0
    eps: tuple[float, ...] = (0.5 / 255, 1 / 255, 2 / 255, 4 / 255)
    queue: int = 8
    steps: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image that was answered. pixels: [3, H, W]; text: [K, D]; clean: the answer's position among the labels."""

    pixels: Tensor
    text: Tensor
    clean: int


class Attack(Protocol):
    """Attacks one image in a thread of its own; as `Prober.attack`."""

    def __call__(
        self, pixels: Tensor, text: Tensor, settings: ProbeSettings, should_stop: Callable[[], bool], /
    ) -> Awaitable[ProbeReport]:
        """The report on it."""


class Sampler:
    """Draws, queues and counts. Runs on the event loop.

    encode: pixels -> features [D], by the engine that serves. busy: whether somebody waits for a probe; then a sample's
    attack stops, and is done again later. seconds: of one attack.
    """

    def __init__(
        self,
        policy: SamplePolicy,
        attack: Attack,
        encode: Callable[[Tensor], Awaitable[Tensor]],
        busy: Callable[[], bool],
        metrics: Metrics,
        chance: random.Random,
        *,
        seconds: float,
    ) -> None:
        self._policy = policy
        self._attack = attack
        self._encode = encode
        self._busy = busy
        self._metrics = metrics
        self._chance = chance
        self._queue: deque[Sample] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._closed = False
        self._settings = ProbeSettings(
            threat=ThreatModel(eps=max(policy.eps)), steps=policy.steps, min_eps=True, seconds=seconds
        )
        if policy.rate:
            for eps, verdict in product(policy.eps, VERDICTS):  # there from the start, at 0
                metrics.count("pmgaft_sampled_probes_total", 0, verdict=verdict, eps=format_eps(eps))

    def draw(self) -> bool:
        """Whether the next image is one of the sample."""
        return self._policy.rate > 0 and self._chance.random() < self._policy.rate

    def offer(self, sample: Sample) -> None:
        """Take a drawn image, if there is room. Its answer must have been made."""
        if len(self._queue) >= self._policy.queue:
            self._metrics.count("pmgaft_probe_samples_total", outcome="dropped")
            return
        self._queue.append(sample)
        self.wake()

    def wake(self) -> None:
        """Go on, if there is something to do."""
        if self._queue and self._runner is None and not self._stopped():
            self._runner = asyncio.create_task(self._run())

    def close(self) -> None:
        """Let an attack that is running end at its next step. What waits is forgotten."""
        self._closed = True

    def _stopped(self) -> bool:
        return self._closed or self._busy()

    async def _run(self) -> None:
        try:
            while self._queue and not self._stopped():
                if await self._probe(self._queue[0]):
                    self._queue.popleft()
        finally:
            self._runner = None

    async def _probe(self, sample: Sample) -> bool:
        """Whether the sample is done with: false where somebody else's probe came first."""
        stopped = False

        def should_stop() -> bool:
            nonlocal stopped
            stopped = stopped or self._stopped()
            return stopped

        try:
            report = await self._attack(sample.pixels, sample.text, self._settings, should_stop)
            if stopped:
                return False
            await self._count(sample, report)
            outcome = "probed"
        except Exception as error:  # nobody waits for it, and the next may be better
            logger.error("the probe of a sampled image failed: %s", type(error).__name__)
            outcome = "failed"
        self._metrics.count("pmgaft_probe_samples_total", outcome=outcome)
        return True

    async def _count(self, sample: Sample, report: ProbeReport) -> None:
        """By eps: broken where an image that near changes both encoders' answers."""
        found = [(report.distance, report.adversarial_pixels)]
        if report.min_eps is not None and report.min_eps.eps is not None:
            found.append((report.min_eps.eps, report.min_eps.pixels))
        confirmed, doubtful = float("inf"), float("inf")
        for distance, pixels in found:
            if pixels is None:
                continue
            features = await self._encode(pixels)
            if int((sample.text @ features).argmax()) != sample.clean:
                confirmed = min(confirmed, distance)
            else:
                doubtful = min(doubtful, distance)
        agreed = report.clean_index == sample.clean
        for eps in self._policy.eps:
            if agreed and confirmed <= eps:
                verdict = "broken"
            elif not agreed or doubtful <= eps or report.verdict == "inconclusive":
                verdict = "inconclusive"
            else:
                verdict = "not_broken"
            self._metrics.count("pmgaft_sampled_probes_total", verdict=verdict, eps=format_eps(eps))
        if agreed and confirmed < float("inf"):
            self._metrics.observe("pmgaft_sampled_min_eps", confirmed)
        self._metrics.count("pmgaft_probe_gradients_total", report.gradients)
