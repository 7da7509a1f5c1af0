"""Probes beside plain requests: who may have one, how many at once and a minute, and how they run.

All probes that wait when the thread becomes free are attacked as one batch; rows share nothing but the encoder, so each
gets what it would get alone. Every step of an attack lets plain requests go first. An attack needs the gradient, so it
runs on the differentiable encoder; what it finds counts if it changes the served encoder's answer, too.

Letters: K labels, D features, H, W.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pmgaft.clip.preprocess import read_pixels
from pmgaft.clip.text import fill
from pmgaft.errors import InputError, PmgaftError, ThreatError
from pmgaft.probe import ProbeReport, ProbeSettings, probe
from pmgaft.probe.certificate import certify, noisy_features
from pmgaft.probe.survival import picture_of, survivals, surviving_pixels
from pmgaft.probe.wording import Wordings, wordings
from pmgaft.threat import ThreatModel

from .batching import Batcher
from .engines import guarded_memory
from .metrics import Metrics, eps_label
from .model import Model
from .probe_answer import Parts, Png, probe_answer, wanted
from .probe_protocol import ProbeAnswer, ProbeOptions
from .protocol import Prediction, Request
from .ranking import rank
from .texts import Texts
from .threads import PROBING, thread_pool

T = TypeVar("T")
Encoded = Callable[[Tensor], Awaitable[Tensor]]
"""Pixels [3, H, W] -> unit features [D], by the engine that serves."""

REFUSALS = ("probe_busy", "probe_rate", "probe_disabled", "probe_images_disabled", "probe_token_missing",
            "probe_token_invalid")  # fmt: skip
"""Codes of probes that were turned away without work."""

PATIENCE = 10.0
"""Forwards of its own that a step waits for plain requests, at most: an attack goes on under any load, if slowly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePolicy:
    """Who may probe, and how much of it there is.

    allow: "on", everybody who may ask at all; "token", who sends `token` as "Authorization: Bearer TOKEN", which then
    also lets in where the service's own token would; "off", nobody. images: whether what was found may be returned.
    queue: probe requests in work or waiting, at most; batch: images attacked together; rate: images a minute, None for
    no limit; seconds: of one batch's attack, and of what is built on it for one image.
    """

    allow: Literal["off", "on", "token"] = "on"
    token: str | None = None
    images: bool = False
    queue: int = 8
    batch: int = 8
    rate: int | None = None
    seconds: float = 30.0


class LaterError(PmgaftError):
    """A probe that cannot be had now. retry_after: whole seconds until it is worth asking again."""

    def __init__(self, message: str, *, code: str, retry_after: float) -> None:
        super().__init__(message, field="probe", code=code)
        self.retry_after = max(1, math.ceil(retry_after))


class Rate:
    """At most so many in any minute; None: without end. clock: seconds that never go back."""

    def __init__(self, most: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._taken: deque[float] = deque()

    def take(self, count: int) -> float:
        """Take so many, at most `most`, and return 0; or take none, and return the seconds until there will be room."""
        if self.most is None:
            return 0.0
        now = self._clock()
        while self._taken and self._taken[0] <= now - 60:
            self._taken.popleft()
        excess = len(self._taken) + count - self.most
        if excess > 0:
            return self._taken[excess - 1] + 60 - now
        self._taken.extend([now] * count)
        return 0.0


class Pause:
    """Steps of attacks go between plain requests: a step waits while one is in work."""

    def __init__(self) -> None:
        self._requests = 0
        self._idle = threading.Event()
        self._idle.set()
        self._step = 0.0

    def change(self, by: int) -> None:
        """So many more plain requests are in work. Called on the event loop."""
        self._requests += by
        if self._requests:
            self._idle.clear()
        else:
            self._idle.set()

    def between(self, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same encoder, waiting before each call."""

        def step(pixels: Tensor) -> Tensor:
            self._idle.wait(PATIENCE * self._step)
            began = time.perf_counter()
            features = encode(pixels)
            self._step = time.perf_counter() - began
            return features

        return step


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One image to be attacked. pixels: [3, H, W]; clean: the served engine's answer to it."""

    pixels: Tensor
    clean: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    pixels: Tensor
    text: Tensor
    settings: ProbeSettings


class _LateError(Exception):
    """There is no time left for a part."""


class Prober:
    """One model's probes. All methods run on the event loop unless they say otherwise.

    encode: by the served engine. threads: of the attack. in_work: requests with a probe that runs or waits.
    """

    def __init__(
        self,
        model: Model,
        policy: ProbePolicy,
        metrics: Metrics,
        texts: Texts,
        encode: Encoded,
        *,
        threads: int,
    ) -> None:
        self.policy = policy
        self.pause = Pause()
        self.in_work = 0
        self._model = model
        self._metrics = metrics
        self._texts = texts
        self._encode = encode
        self._gradient = self.pause.between(model.gradient)
        self._rate = Rate(policy.rate)
        self._thread = thread_pool("probe", 1, threads, PROBING)
        self._batches = Batcher(
            self._attack, self._thread, policy.batch, lambda size: metrics.observe("pmgaft_probe_batch_images", size)
        )
        self._began: float | None = None  # the attack that is running
        self._usual = 1.0  # seconds of the last one

    def check(self, request: Request, authorization: str | None) -> None:
        """Whether a probe that is asked for may be had, and now. From any thread.

        Raises: PmgaftError (probe_disabled, probe_token_missing, probe_token_invalid, probe_images_disabled,
        probe_busy); ThreatError (seconds_invalid); InputError (probe_images_too_many).
        """
        if request.probe is None:
            return
        policy, options = self.policy, request.probe
        if policy.allow == "off":
            message = "this server answers no probes; pmgaft serve --probe on, or --probe token, allows them"
            raise PmgaftError(message, field="probe", code="probe_disabled")
        if policy.allow == "token":
            _check_token(authorization, policy.token)
        if options.return_image and not policy.images:
            message = "this server returns no adversarial images; ask without return_image"
            raise PmgaftError(message, field="probe.return_image", code="probe_images_disabled")
        if options.settings.seconds is not None and options.settings.seconds > policy.seconds:
            message = f"seconds {options.settings.seconds:g} is too much; at most {policy.seconds:g} are allowed"
            raise ThreatError(message, field="probe.seconds", code="seconds_invalid")
        if policy.rate is not None and len(request.images) > policy.rate:
            message = f"{len(request.images)} images are too many to probe; this server probes {policy.rate} a minute"
            raise InputError(message, field="images", code="probe_images_too_many")
        if self.in_work >= policy.queue:
            message = f"{self.in_work} probes are already running or waiting; try again, or without a probe"
            raise LaterError(message, code="probe_busy", retry_after=self._seconds_left())

    @contextmanager
    def turn(self, request: Request, authorization: str | None) -> Iterator[None]:
        """Room for this request's probe, if it asks for one. Raises: as `check`, and LaterError (probe_rate)."""
        self.check(request, authorization)
        if request.probe is None:
            yield
            return
        wait = self._rate.take(len(request.images))
        if wait:
            message = f"this server probes {self._rate.most} images a minute, and they are used up"
            raise LaterError(message, code="probe_rate", retry_after=wait)
        self._change_in_work(1)
        self.pause.change(-1)
        try:
            yield
        finally:
            self.pause.change(1)
            self._change_in_work(-1)

    async def answers(self, request: Request, targets: Sequence[Target], text: Tensor) -> list[ProbeAnswer]:
        """Attack each image of a request that asks for it, in batches with others'. text: [K, D]."""
        assert request.probe is not None
        work = [self._one(request, request.probe, target, turn, text) for turn, target in enumerate(targets)]
        return list(await asyncio.gather(*work))

    async def attack(
        self, pixels: Tensor, text: Tensor, settings: ProbeSettings, should_stop: Callable[[], bool]
    ) -> ProbeReport:
        """Attack one image by itself; should_stop: as for `probe`. For what nobody waits for."""
        row = _Row(pixels=pixels, text=text, settings=settings)
        (report,) = await self._in_thread(self._attack, [row], should_stop)
        return report

    async def warm_up(self, pixels: Tensor, text: Tensor) -> None:
        """Run a short attack, which nobody counts."""
        await self.attack(pixels, text, ProbeSettings(threat=ThreatModel(eps=1 / 255), steps=2), lambda: False)

    def close(self) -> None:
        """End the thread once its work is done."""
        self._thread.shutdown()

    async def _one(
        self, request: Request, options: ProbeOptions, target: Target, turn: int, text: Tensor
    ) -> ProbeAnswer:
        seconds = options.settings.seconds or self.policy.seconds
        settings = replace(options.settings, seconds=seconds)
        report, _ = await self._batches(_Row(pixels=target.pixels, text=text, settings=settings), turn=turn)
        served = await self._served(report.adversarial_pixels, text, request.labels)
        nearest = report.min_eps
        smallest = await self._served(None if nearest is None else nearest.pixels, text, request.labels)
        parts = await self._parts(request, options, target, report, text, time.monotonic() + seconds - report.seconds)
        answer = probe_answer(
            report,
            request.labels,
            request.templates,
            self._model.info.bundle,
            clean=target.clean,
            served=served,
            smallest=smallest,
            parts=parts,
        )
        self._metrics.count("pmgaft_probes_total", verdict=answer.verdict, eps=eps_label(settings.threat.eps))
        self._metrics.observe("pmgaft_probe_seconds", report.seconds, verdict=answer.verdict)
        self._metrics.count("pmgaft_probe_gradients_total", report.gradients)
        if nearest is not None and nearest.eps is not None:
            self._metrics.observe("pmgaft_probe_min_eps", nearest.eps, norm=settings.threat.norm)
        return answer

    def _attack(self, rows: Sequence[_Row], should_stop: Callable[[], bool] | None = None) -> list[ProbeReport]:
        """Runs in the thread."""
        self._began = time.monotonic()
        try:
            with guarded_memory():
                return probe(
                    self._gradient,
                    self._model.logit_scale,
                    torch.stack([row.pixels for row in rows]),
                    [row.text for row in rows],
                    [row.settings for row in rows],
                    should_stop,
                )
        finally:
            self._usual = time.monotonic() - self._began
            self._began = None

    async def _served(self, pixels: Tensor | None, text: Tensor, labels: Sequence[str]) -> Prediction | None:
        """What the served engine says to an image, if there is one."""
        if pixels is None:
            return None
        return rank(await self._encode(pixels), text, self._model.logit_scale, labels, 1)[0]

    async def _parts(
        self,
        request: Request,
        options: ProbeOptions,
        target: Target,
        report: ProbeReport,
        text: Tensor,
        deadline: float,
    ) -> Parts:
        """What is asked for beside the attack, as far as there is time."""
        parts = Parts()

        def encode(pixels: Tensor) -> Tensor:
            if time.monotonic() >= deadline:
                raise _LateError
            return self._gradient(pixels)

        async def part(name: str, work: Awaitable[T]) -> T | None:
            try:
                return await work
            except _LateError:
                parts.unfinished.append(name)
                return None

        def logits_of(pixels: Tensor) -> Tensor:
            return self._model.logit_scale * encode(pixels) @ text.T

        def flips(logits: Tensor) -> bool:
            return wanted(report, int(logits.argmax()))

        clean, found = target.pixels, report.adversarial_pixels
        if options.wording or options.synonyms:
            parts.wording = await part("wording", self._wording(request, options, clean, deadline))
        if options.survival and found is not None:
            parts.survival = await part("survival", self._in_thread(survivals, logits_of, flips, clean, found))
        if options.return_image and found is not None:
            threat = options.settings.threat
            best = await part("image", self._in_thread(surviving_pixels, logits_of, flips, clean, found, threat))
            if best is not None:
                parts.png = await self._png(best[0], clean, text, request.labels)
        if options.sigma is not None:
            noisy = self._in_thread(_noisy, encode, clean, options)
            if (features := await part("certificate", noisy)) is not None:
                parts.certificate = certify(features, text, groups=options.settings.groups)
        return parts

    async def _wording(self, request: Request, options: ProbeOptions, clean: Tensor, deadline: float) -> Wordings:
        """By the served engine. Each text's features come from the cache, or take their turn with others' texts."""
        known: dict[str, Tensor] = {}
        labels, templates = request.labels, request.templates
        lists = [(labels, template) for template in dict.fromkeys((*templates, *options.wording))]
        lists += [(options.synonyms, template) for template in templates if options.synonyms]
        for names, template in lists:
            if time.monotonic() >= deadline:
                raise _LateError
            features = await self._texts.features(names, (template,))
            known.update(zip((fill(template, name) for name in names), features, strict=True))
        return await self._in_thread(
            lambda features: wordings(
                lambda texts: torch.stack([known[text] for text in texts]),
                features,
                labels,
                templates,
                others=options.wording,
                synonyms=options.synonyms,
                groups=options.settings.groups,
            ),
            await self._encode(clean),
        )

    async def _png(self, pixels: Tensor, clean: Tensor, text: Tensor, labels: Sequence[str]) -> Png:
        """The image as a file, and what the served engine says to this very file."""
        buffer = io.BytesIO()
        picture_of(pixels).save(buffer, "PNG")
        again = read_pixels(buffer.getvalue(), self._model.preprocess)
        answer = await self._served(again, text, labels)
        assert answer is not None
        return Png(
            base64=base64.b64encode(buffer.getvalue()).decode(),
            label=answer.label,
            distance=float((again - clean).abs().max()),
        )

    def _seconds_left(self) -> float:
        """Until the attack that is running will probably end."""
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        return min(self._usual, self.policy.seconds) - elapsed

    def _change_in_work(self, by: int) -> None:
        self.in_work += by
        self._metrics.set("pmgaft_probes_in_work", self.in_work)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def same_token(authorization: str | None, token: str | None) -> bool:
    """Whether the header's value is "Bearer TOKEN"; a token of None is nobody's."""
    return token is not None and hmac.compare_digest((authorization or "").encode(), f"Bearer {token}".encode())


def _check_token(authorization: str | None, token: str | None) -> None:
    if not authorization:
        message = "probes need a token of their own here: send the header Authorization: Bearer PROBE_TOKEN"
        raise PmgaftError(message, field="probe", code="probe_token_missing")
    if not same_token(authorization, token):
        raise PmgaftError("this token allows no probes", field="probe", code="probe_token_invalid")


def _noisy(encode: Callable[[Tensor], Tensor], pixels: Tensor, options: ProbeOptions) -> Any:
    return noisy_features(encode, pixels, sigma=options.sigma or 0.0, draws=options.draws, seed=options.settings.seed)
