"""Requests in, answers out: admission, decoding, label features, batched encoding, ranking, probes. Knows no front end.

A request passes these stages, each where it delays nobody:

    admission   on the event loop: token, room in the queue; refused here at once
    decode      in a pool of threads: the body, then each image to pixels
    text        known labels from the cache on the loop; unknown ones of all requests are encoded together in a thread
    image       in the encoder's thread, in batches that form while it is busy: a lone request waits for nobody
    rank        on the loop: one small matrix product
    probe       in threads of their own, of lower priority, with a short queue; an attack needs the gradient, so it runs
                on the differentiable encoder, and what it finds counts if it changes the served encoder's answer too

Letters: K labels, D features, H, W. All methods of Service run on one event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pmgaft import __version__
from pmgaft.clip.lint import lint, wording_distance
from pmgaft.clip.preprocess import PreprocessSpec, read_pixels
from pmgaft.clip.text import TextEncoder
from pmgaft.errors import InputError, PmgaftError
from pmgaft.probe import ProbeReport, ProbeSettings, eps_text, probe
from pmgaft.threat import ThreatModel, format_eps
from pmgaft_export.bundle import Bundle

from . import protocol
from .batching import Batcher
from .engines import Encode, differentiable, guarded_memory, open_engine
from .label_sets import LabelSet
from .metrics import STAGES, Metrics, eps_label
from .protocol import STATUS, Adversarial, Limits, LintFinding, Prediction, ProbeAnswer, ProbeOptions, Request, Result
from .texts import Texts

logger = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP_SECONDS = 2.0  # for ever larger batches, the first of each size being slow
_WARM_UP_LABELS = LabelSet(name="", labels=("a", "b"))
NOTE = "probabilities are over the request's labels alone"
NOTE_ONE_LABEL = "with a single label the probability is always 1; send several labels to compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much the service takes on at once, and for whom.

    token: what clients must send as "Authorization: Bearer TOKEN"; None lets everybody in.
    requests: accepted and unanswered at most; more are refused with 503. batch: images encoded at once.
    threads: of the encoder; decoders: threads that decode. cache_bytes: of label features.
    probes: probe requests that run at once (0: none are served); probe_queue: those that may wait beside them; more are
    refused with 429. probe_seconds: of one probe.
    """

    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    requests: int = 64
    batch: int = 32
    threads: int = 1
    decoders: int = 2
    cache_bytes: int = 256 * 2**20
    probes: int = 1
    probe_queue: int = 2
    probe_seconds: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served. image: pixels [B, 3, H, W] -> unit features [B, D]; gradient: the same, with a derivative;
    text: texts -> unit features [N, D]."""

    info: protocol.ModelInfo
    image: Encode
    gradient: Encode
    text: Callable[[Sequence[str]], Tensor]
    preprocess: PreprocessSpec
    logit_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A request as a front end has it. fields: form fields by name, or the whole body under the name "body"."""

    fields: Mapping[str, bytes]
    content_type: str | None = None
    authorization: str | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A finished answer: JSON bytes, an HTTP status, and headers beside the content type."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as it is logged: what happened and how much of it, nothing of what it was about.

    outcome: ok, partial, refused or failed. code: "ok" or the error's. milliseconds: by stage, and in total.
    bytes_in, bytes_out: of the bodies. labels, templates, images: how many, 0 where the request could not be read.
    """

    id: str
    status: int
    outcome: str
    code: str
    milliseconds: Mapping[str, float]
    bytes_in: int
    bytes_out: int
    images: int
    labels: int
    templates: int
    probe: bool


def model_of(bundle: Bundle, engine: str, device: torch.device, threads: int) -> Model:
    """Load what is served from a bundle. engine: as for `open_engine`. Raises: BundleError, InputError."""
    opened = open_engine(bundle, engine, device, threads)
    encoder = TextEncoder(bundle.tokenizer(), opened.text, bundle.manifest.text.causal)
    return Model(
        info=protocol.ModelInfo(
            name=bundle.manifest.name, bundle=bundle.hash, engine=opened.name, format=opened.format
        ),
        image=opened.image,
        gradient=differentiable(bundle, device),
        text=encoder.encode,
        preprocess=bundle.preprocess,
        logit_scale=bundle.manifest.logit_scale,
    )


class Stopwatch:
    """Seconds per stage of one request."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time inside the `with` block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def milliseconds(self) -> dict[str, float]:
        """For the answer: the stages in the order they happen, and all of it."""
        times = {stage: self.stages[stage] for stage in STAGES if stage in self.stages}
        times["total"] = time.perf_counter() - self.start
        return {stage: round(seconds * 1000, 3) for stage, seconds in times.items()}


@dataclass(slots=True)
class _Job:
    """One request on its way through. request: once it could be read."""

    incoming: Incoming
    watch: Stopwatch = field(default_factory=Stopwatch)
    request: Request | None = None


class Service:
    """One model's requests, answered. Made on the event loop's thread; `answer` is the whole interface.

    draining: asked at each arrival; true means that no new request is taken. on_answered: told of every answer.
    sets: label sets that requests may call by name. warm: label lists to be known from the start.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        metrics: Metrics,
        draining: Callable[[], bool] = lambda: False,
        on_answered: Callable[[Record], None] = lambda record: None,
        sets: Sequence[LabelSet] = (),
        warm: Sequence[LabelSet] = (),
    ) -> None:
        self.model = model
        self.settings = settings
        self._metrics = metrics
        self._draining = draining
        self._on_answered = on_answered
        self._sets = {one.name: one for one in sets}
        self._warm = warm
        self._in_flight = 0
        self._probing = 0
        self._decoders = _threads("decode", settings.decoders, 1)
        self._text_thread = _threads("text", 1, settings.threads)
        self._image_thread = _threads("image", 1, settings.threads)
        self._probes = _threads("probe", max(1, settings.probes), max(1, settings.threads // 2), yielding=True)
        self._texts = Texts(
            model.text,
            self._text_thread,
            metrics,
            most_bytes=settings.cache_bytes,
            most_missing=settings.limits.texts,
        )
        self._images = Batcher(
            self._encode_batch,
            self._image_thread,
            settings.batch,
            lambda size: metrics.observe("pmgaft_batch_images", size),
        )
        self._wording: float | None = None
        info = model.info
        metrics.set(
            "pmgaft_model_info",
            1,
            name=info.name,
            bundle=info.bundle,
            engine=info.engine,
            format=info.format,
            version=__version__,
        )

    async def answer(self, incoming: Incoming) -> Reply:
        """Answer one request; whatever happens, there is an answer, and it is JSON."""
        job = _Job(incoming)
        try:
            self._admit(incoming)
        except PmgaftError as error:
            self._metrics.count("pmgaft_rejected_total", reason=error.code)
            return self._refuse(error, job)
        self._change_in_flight(1)
        try:
            reply, partial = await self._serve(job)
        except PmgaftError as error:
            if error.code in ("probe_busy", "probe_disabled"):
                self._metrics.count("pmgaft_rejected_total", reason=error.code)
            return self._refuse(error, job)
        except Exception as error:
            return self._refuse(PmgaftError(str(error), code="internal"), job)
        else:
            self._record(job, reply, "partial" if partial else "ok", "ok")
            return reply
        finally:
            self._change_in_flight(-1)

    def warm_up(self) -> None:
        """Encode the label sets, and run everything a few times, so that the first request is as fast as the tenth.

        Not to be called on a running event loop.
        """
        self._texts.warm_up(list(self._sets.values()), [*self._warm, _WARM_UP_LABELS])
        asyncio.run(self._warm_up())

    async def _warm_up(self) -> None:
        height, width = self.model.preprocess.size
        start = time.monotonic()
        for size in (1, 1, *(2**power for power in range(self.settings.batch.bit_length()))):
            if time.monotonic() < start + WARM_UP_SECONDS:
                await self._in(self._image_thread, self.model.image, torch.zeros(size, 3, height, width))
        large = _jpeg(4 * width, 4 * height)  # that is scaled while it is decoded
        everyone = (self._in(self._decoders, read_pixels, large, self.model.preprocess) for _ in range(32))
        pixels = await asyncio.gather(*everyone)
        fields = {"image": _jpeg(8, 8), "labels": _WARM_UP_LABELS.labels[0].encode()}
        for _ in range(2):
            await self._serve(_Job(Incoming(fields=fields, content_type="multipart/form-data")))
        if self.settings.probes:
            text = await self._texts.features(_WARM_UP_LABELS.labels, _WARM_UP_LABELS.templates)
            settings = ProbeSettings(threat=ThreatModel(eps=1 / 255), steps=2)
            await self._in(self._probes, self._attack, [pixels[0]], text, settings)

    def close(self) -> None:
        """End the threads once their work is done."""
        for threads in (self._decoders, self._text_thread, self._image_thread, self._probes):
            threads.shutdown()

    def _admit(self, incoming: Incoming) -> None:
        if self.settings.token is not None and not _same_token(incoming.authorization, self.settings.token):
            message = "this server asks for a token: send the header Authorization: Bearer TOKEN"
            raise PmgaftError(message, code="token_invalid")
        if self._draining():
            raise PmgaftError("the server is stopping and takes no new requests", code="draining")
        if self._in_flight >= self.settings.requests:
            raise PmgaftError(f"the server is full: {self._in_flight} requests are in work", code="overloaded")

    async def _serve(self, job: _Job) -> tuple[Reply, bool]:
        """A request's answer, and whether some of several images failed."""
        request, images = await self._read(job)
        with self._probe_turn(request):
            text = await self._text(request, job.watch)
            predicted = await _all(
                [self._predict(image, turn, text, request, job.watch) for turn, image in enumerate(images)]
            )
            results = [_result(answer, request) for answer in predicted]
            good = [
                (image, answer[0], result)
                for image, answer, result in zip(images, predicted, results, strict=True)
                if isinstance(image, Tensor) and isinstance(answer, list)
            ]
            await self._probe(request, good, text, job.watch)
        found = await self._lint(request, text, job.watch)
        return self._reply(request, results, found, job), any(result.error for result in results)

    async def _read(self, job: _Job) -> tuple[Request, list[Tensor | PmgaftError]]:
        """The request, and each image's pixels [3, H, W]; of several images, those that fail are their errors."""
        with job.watch("decode"):
            request, first = await self._in(self._decoders, self._open, job)
            others = (self._in(self._decoders, self._pixels, image) for image in request.images[1:])
            return request, [first, *await _all(list(others))]

    def _open(self, job: _Job) -> tuple[Request, Tensor | PmgaftError]:
        """The request and its first image, by one visit to a decoding thread."""
        incoming = job.incoming
        request = protocol.parse(incoming.content_type, incoming.fields, self.settings.limits, self._sets)
        job.request = request
        self._check_probe_room(request)  # before more is spent on it
        return request, self._pixels(request.images[0])

    def _pixels(self, image: bytes | PmgaftError) -> Tensor | PmgaftError:
        """Runs in a decoding thread."""
        if isinstance(image, PmgaftError):
            return image
        try:
            return read_pixels(image, self.model.preprocess, self.settings.limits.image)
        except Exception as error:
            return _own_error(error)

    async def _text(self, request: Request, watch: Stopwatch) -> Tensor:
        """The labels' features [K, D]; only unknown labels wait for the text encoder."""
        with watch("text"):
            return await self._texts.features(request.labels, request.templates, request.label_set)

    async def _predict(
        self, image: Tensor | PmgaftError, turn: int, text: Tensor, request: Request, watch: Stopwatch
    ) -> list[Prediction] | PmgaftError:
        """The best labels for one image, the most probable first; or, where it is one of several, its error."""
        try:
            if isinstance(image, PmgaftError):
                raise image
            features = await self._encode(image, watch, turn)
            with watch("rank"):
                return rank(features, text, self.model.logit_scale, request.labels, request.top_k)
        except Exception as error:
            if not request.several:
                raise
            return _own_error(error)

    async def _encode(self, pixels: Tensor, watch: Stopwatch, turn: int = 0) -> Tensor:
        """Unit features [D] of pixels [3, H, W], by the served engine."""
        start = time.perf_counter()
        features, waited = await self._images(pixels, turn=turn)
        watch.add("queue", waited)
        watch.add("image", time.perf_counter() - start - waited)
        return features

    def _encode_batch(self, pixels: Sequence[Tensor]) -> list[Tensor | Exception]:
        """Runs in the encoder's thread."""
        features = self.model.image(torch.stack(list(pixels)))
        good = features.isfinite().all(dim=1).tolist()
        return [
            row if fine else PmgaftError("the encoder gave no number") for row, fine in zip(features, good, strict=True)
        ]

    async def _lint(self, request: Request, text: Tensor, watch: Stopwatch) -> list[LintFinding] | None:
        """Labels of the request that are hard to tell apart, if it asks."""
        if not request.lint:
            return None
        with watch("text"):
            found = await self._in(self._text_thread, lambda: lint(request.labels, text, self._wording_distance()))
        return [
            LintFinding(
                kind=one.kind,
                labels=list(one.labels),
                similarity=round(one.similarity, 6),
                wordings=round(one.wordings, 3),
                statement=one.statement,
            )
            for one in found
        ]

    def _wording_distance(self) -> float:
        """Runs in the text thread; the same for every request."""
        if self._wording is None:
            self._wording = wording_distance(self.model.text)
        return self._wording

    def _check_probe_room(self, request: Request) -> None:
        """Raises: PmgaftError (probe_busy, probe_disabled) where a probe that is asked for cannot be had now."""
        if request.probe is None:
            return
        if not self.settings.probes:
            raise PmgaftError("this server answers no probes", field="probe", code="probe_disabled")
        if self._probing >= self.settings.probes + self.settings.probe_queue:
            message = f"{self._probing} probes are already running or waiting; try again soon, or without a probe"
            raise PmgaftError(message, field="probe", code="probe_busy")

    @contextmanager
    def _probe_turn(self, request: Request) -> Iterator[None]:
        """Room for this request's probe, if it asks for one. Raises: as `_check_probe_room`."""
        self._check_probe_room(request)
        asked = request.probe is not None
        self._probing += asked
        try:
            yield
        finally:
            self._probing -= asked

    async def _probe(
        self, request: Request, targets: Sequence[tuple[Tensor, Prediction, Result]], text: Tensor, watch: Stopwatch
    ) -> None:
        """Attack images [3, H, W] together, if the request asks for it, and add to each one's result what was found."""
        if request.probe is None or not targets:
            return
        settings = self._probe_settings(request.probe, request.labels)
        with watch("probe"):
            reports = await self._in(self._probes, self._attack, [image for image, _, _ in targets], text, settings)
        for report, (_, clean, result) in zip(reports, targets, strict=True):
            served = await self._served_answer(report, text, request, watch)
            answer = probe_answer(report, request.labels, clean, served)
            self._metrics.count("pmgaft_probes_total", verdict=answer.verdict, eps=eps_label(settings.threat.eps))
            self._metrics.observe("pmgaft_probe_seconds", report.seconds, verdict=answer.verdict)
            self._metrics.count("pmgaft_probe_gradients_total", report.gradients)
            result.probe = answer

    def _probe_settings(self, options: ProbeOptions, labels: Sequence[str]) -> ProbeSettings:
        return ProbeSettings(
            threat=options.threat,
            steps=options.steps,
            restarts=options.restarts,
            step_size=options.step_size,
            seed=options.seed,
            seconds=self.settings.probe_seconds,
            target=None if options.target is None else labels.index(options.target),
            min_eps=options.min_eps,
        )

    def _attack(self, images: Sequence[Tensor], text: Tensor, settings: ProbeSettings) -> list[ProbeReport]:
        """Runs in a probe thread."""
        count = len(images)
        with guarded_memory():
            return probe(
                self.model.gradient,
                self.model.logit_scale,
                torch.stack(list(images)),
                [text] * count,
                [settings] * count,
            )

    async def _served_answer(
        self, report: ProbeReport, text: Tensor, request: Request, watch: Stopwatch
    ) -> Prediction | None:
        """What the served engine says to the adversarial image, if there is one."""
        if report.verdict != "broken" or report.adversarial_pixels is None:
            return None
        features = await self._encode(report.adversarial_pixels, watch)
        return rank(features, text, self.model.logit_scale, request.labels, 1)[0]

    def _reply(self, request: Request, results: Sequence[Result], found: list[LintFinding] | None, job: _Job) -> Reply:
        common: dict[str, Any] = {
            "lint": found,
            "note": NOTE_ONE_LABEL if len(request.labels) == 1 else NOTE,
            "model": self.model.info,
            "timing_ms": job.watch.milliseconds(),
            "request_id": job.incoming.request_id,
        }
        answer: protocol.Answer | protocol.Answers
        if request.several:
            answer = protocol.Answers(results=list(results), **common)
        else:
            answer = protocol.Answer(predictions=results[0].predictions or [], probe=results[0].probe, **common)
        body = answer.model_dump_json(exclude_none=True).encode()
        if len(body) > (most := self.settings.limits.answer_bytes):
            message = f"the answer has {len(body):,} bytes; at most {most:,} are allowed: ask for fewer by top_k"
            raise InputError(message, field="top_k", code="answer_too_large")
        return Reply(status=200, body=body)

    def _refuse(self, error: PmgaftError, job: _Job) -> Reply:
        body = protocol.error_body(error)
        status = STATUS[body.code]
        if status == 500:
            logger.error("request %s failed", job.incoming.request_id, exc_info=error.__cause__ or error)
        wait = protocol.RETRY_AFTER_SECONDS.get(body.code)
        answer = protocol.ErrorAnswer(error=body, request_id=job.incoming.request_id)
        reply = Reply(
            status=status,
            body=answer.model_dump_json(exclude_none=True).encode(),
            headers={} if wait is None else {"Retry-After": str(wait)},
        )
        self._record(job, reply, "refused" if status < 500 else "failed", body.code)
        return reply

    def _record(self, job: _Job, reply: Reply, outcome: str, code: str) -> None:
        """Count and log one answer."""
        milliseconds, request = job.watch.milliseconds(), job.request
        self._metrics.count("pmgaft_requests_total", outcome=outcome, code=code)
        self._metrics.observe("pmgaft_request_seconds", milliseconds["total"] / 1000, outcome=outcome)
        for stage, seconds in job.watch.stages.items():
            self._metrics.observe("pmgaft_stage_seconds", seconds, stage=stage)
        if request is not None:
            self._metrics.observe("pmgaft_labels_per_request", len(request.labels))
        self._on_answered(
            Record(
                id=job.incoming.request_id,
                status=reply.status,
                outcome=outcome,
                code=code,
                milliseconds=milliseconds,
                bytes_in=sum(map(len, job.incoming.fields.values())),
                bytes_out=len(reply.body),
                images=len(request.images) if request else 0,
                labels=len(request.labels) if request else 0,
                templates=len(request.templates) if request else 0,
                probe=request is not None and request.probe is not None,
            )
        )

    def _change_in_flight(self, by: int) -> None:
        self._in_flight += by
        self._metrics.set("pmgaft_in_flight_requests", self._in_flight)

    async def _in(self, threads: Executor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def rank(
    features: Tensor, text: Tensor, logit_scale: float, labels: Sequence[str], top_k: int | None = None
) -> list[Prediction]:
    """The `top_k` most probable labels (None: all), equal ones in the request's order.

    features: [D]; text: [K, D]. Probabilities are over all K labels.
    """
    similarity = text @ features
    order = similarity.argsort(descending=True, stable=True)[:top_k]
    probability = (logit_scale * similarity).softmax(dim=0)[order]
    rows = zip(order.tolist(), probability.tolist(), similarity[order].tolist(), strict=True)
    return [
        Prediction.model_construct(label=labels[i], probability=round(p, 6), similarity=round(s, 6)) for i, p, s in rows
    ]


def probe_answer(
    report: ProbeReport, labels: Sequence[str], clean: Prediction, served: Prediction | None
) -> ProbeAnswer:
    """A probe's report in the words of the interface.

    clean: the served engine's answer to the image itself; served: its answer to the adversarial image, if there is one.
    The attack ran on the differentiable encoder. Where the served engine is not fooled by what fooled that one, or they
    differ about the image itself, nothing is claimed: the verdict is inconclusive, and `reason` says so.
    """
    verdict, reason = report.verdict, report.reason
    if labels[report.clean_index] != clean.label:
        verdict = "inconclusive"
        reason = f"the attacked encoder answers {labels[report.clean_index]!r} to the image itself"
    elif served is not None and not _as_asked(served.label, labels, report):
        verdict = "inconclusive"
        reason = "the adversarial image fools the attacked encoder and not the engine that serves"
    settings = report.settings
    return ProbeAnswer(
        verdict=verdict,
        reason=reason,
        statement=_statement(verdict, reason, report, clean, served),
        threat_model=settings.threat.to_json(),
        attack={
            "name": settings.used_algorithm,
            "steps": settings.steps,
            "restarts": settings.restarts,
            "step_size": format_eps(settings.used_step_size),
            "seed": settings.seed,
        },
        clean=Adversarial(label=clean.label, probability=clean.probability),
        adversarial=None if served is None else Adversarial(label=served.label, probability=served.probability),
        min_eps=_smallest_eps(report, labels),
        gradients=report.gradients,
        forwards=report.forwards,
        zero_gradient_share=round(report.zero_gradient_share, 6),
        seconds=round(report.seconds, 3),
    )


def _as_asked(served: str, labels: Sequence[str], report: ProbeReport) -> bool:
    """Whether the served engine's answer to the adversarial image is what the probe was after."""
    target = report.settings.target
    return served != labels[report.clean_index] if target is None else served == labels[target]


def _smallest_eps(report: ProbeReport, labels: Sequence[str]) -> protocol.SmallestEps | None:
    found, norm = report.min_eps, report.settings.threat.norm
    if found is None:
        return None
    return protocol.SmallestEps(
        eps=None if found.eps is None else eps_text(found.eps, norm),
        eps_value=found.eps,
        label=None if found.index is None else labels[found.index],
        failed_eps=eps_text(found.failed_eps, norm),
        first_order=None if found.first_order is None else eps_text(found.first_order, norm),
        resolution=found.resolution,
        finished=found.finished,
        gradients=found.gradients,
    )


def _statement(
    verdict: str, reason: str | None, report: ProbeReport, clean: Prediction, served: Prediction | None
) -> str:
    threat = report.settings.threat
    if verdict == "broken" and served is not None:
        return f"an image within {threat} changes this answer from {clean.label!r} to {served.label!r}"
    if verdict == "not_broken":
        tried = f"this attack, with {report.attack_gradients} gradients,"
        return f"{tried} found no image within {threat} that changes the answer {clean.label!r}; others may exist"
    return f"nothing can be said about images within {threat}: {reason}"


def _result(answer: list[Prediction] | PmgaftError, request: Request) -> Result:
    if isinstance(answer, PmgaftError):
        return Result(error=protocol.error_body(answer))
    return Result.model_construct(predictions=answer)


def _jpeg(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height)).save(content, "JPEG")
    return content.getvalue()


async def _all(work: Sequence[Coroutine[Any, Any, T] | asyncio.Future[T]]) -> list[T]:
    """All results in order; what is alone needs no task of its own."""
    if len(work) == 1:
        return [await work[0]]
    return list(await asyncio.gather(*work))


def _own_error(error: Exception) -> PmgaftError:
    """An error of our tree as it is; any other one is logged and becomes "internal"."""
    if isinstance(error, PmgaftError):
        return error
    logger.error("one image of a request failed", exc_info=error)
    return PmgaftError(str(error), code="internal")


def _same_token(authorization: str | None, token: str) -> bool:
    return hmac.compare_digest((authorization or "").encode(), f"Bearer {token}".encode())


def _threads(name: str, workers: int, torch_threads: int, *, yielding: bool = False) -> ThreadPoolExecutor:
    """A pool whose threads each compute with `torch_threads`; yielding: the processor goes to others first (Linux)."""

    def prepare() -> None:
        torch.set_num_threads(torch_threads)
        if yielding and sys.platform == "linux":  # there, priorities are a thread's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)

    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=prepare)
