"""Requests in, answers out: admission, decoding, label features, batched encoding, ranking, probes. Knows no front end.

A request passes these stages, each where it delays nobody:

    admission   on the event loop: token, room in the queue; refused here at once
    decode      in a pool of threads: the body, then each image to pixels
    text        known labels from the cache on the loop; unknown ones are encoded in one thread of their own
    image       in the encoder's thread, in batches that form while it is busy: a lone request waits for nobody
    rank        on the loop: one small matrix product
    probe       in threads of their own, of lower priority, with a short queue; an attack needs the gradient, so it runs
                on the differentiable encoder, and what it finds counts if it changes the served encoder's answer too

Letters: K labels, D features, H, W. All methods of Service run on one event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pmgaft import __version__
from pmgaft.clip.preprocess import PreprocessSpec, open_image, to_pixels
from pmgaft.clip.text import DEFAULT_TEMPLATES, TextEncoder, label_features
from pmgaft.errors import PmgaftError
from pmgaft.probe import ProbeReport, ProbeSettings, probe
from pmgaft.threat import format_eps
from pmgaft_export.bundle import Bundle

from . import protocol
from .engines import Encode, differentiable, guarded_memory, open_engine
from .metrics import STAGES, Metrics, eps_label
from .protocol import STATUS, Adversarial, Limits, Prediction, ProbeAnswer, ProbeOptions, Request, Result
from .text_cache import TextCache

logger = logging.getLogger(__name__)

T = TypeVar("T")

NOTE = "probabilities are over the request's labels alone"
NOTE_ONE_LABEL = "with a single label the probability is always 1; send several labels to compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much the service takes on at once, and for whom.

    token: what clients must send as "Authorization: Bearer TOKEN"; None lets everybody in.
    requests: accepted and unanswered at most; more are refused with 503. batch: images encoded at once.
    threads: of the encoder; decoders: threads that decode. probes: probe requests that run at once (0: none are
    served); probe_queue: those that may wait beside them; more are refused with 429. probe_seconds: of one probe.
    """

    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    requests: int = 64
    batch: int = 32
    threads: int = 1
    decoders: int = 2
    probes: int = 1
    probe_queue: int = 2
    probe_seconds: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served. image: pixels [B, 3, H, W] -> unit features [B, D]; gradient: the same, with a derivative;
    text: (labels, templates) -> unit features [K, D]."""

    info: protocol.ModelInfo
    image: Encode
    gradient: Encode
    text: Callable[[Sequence[str], Sequence[str]], Tensor]
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
        text=lambda labels, templates: label_features(encoder.encode, labels, templates),
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


class Batcher:
    """Rows of many callers, encoded together: whatever waits when the encoder becomes free is the next batch.

    encode: [B, ...] -> [B, D], run in `thread`. most: rows at once. on_batch: told each batch's size.
    A batch that fails is tried again in halves, so that only the rows at fault fail.
    """

    def __init__(self, encode: Encode, thread: Executor, most: int, on_batch: Callable[[int], None]) -> None:
        self._encode = encode
        self._thread = thread
        self._most = most
        self._on_batch = on_batch
        self._waiting: deque[tuple[Tensor, asyncio.Future[tuple[Tensor, float]], float]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def __call__(self, row: Tensor) -> tuple[Tensor, float]:
        """One row's features [D], and the seconds it waited for its batch to start. Raises: what encoding it raises."""
        future: asyncio.Future[tuple[Tensor, float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future, time.perf_counter()))
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        """Encode batch after batch until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            self._on_batch(len(batch))
            start = time.perf_counter()
            try:
                results = await loop.run_in_executor(self._thread, self._encode_all, [row for row, _, _ in batch])
            except Exception as error:  # the thread is gone: nobody may wait for ever
                results = [error] * len(batch)
            for (_, future, arrived), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # its request was given up
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result((result, start - arrived))
        self._runner = None

    def _encode_all(self, rows: Sequence[Tensor]) -> list[Tensor | Exception]:
        """Each row's features or its error."""
        try:
            features = self._encode(torch.stack(list(rows)))
        except Exception as error:
            if len(rows) == 1:
                return [error]
            half = len(rows) // 2
            return self._encode_all(rows[:half]) + self._encode_all(rows[half:])
        return [row if row.isfinite().all() else PmgaftError("the encoder gave no number") for row in features]


class Service:
    """One model's requests, answered. Made on the event loop's thread; `answer` is the whole interface.

    draining: asked at each arrival; true means that no new request is taken.
    """

    def __init__(
        self, model: Model, settings: Settings, metrics: Metrics, draining: Callable[[], bool] = lambda: False
    ) -> None:
        self.model = model
        self.settings = settings
        self._metrics = metrics
        self._draining = draining
        self._in_flight = 0
        self._probing = 0
        self._cache = TextCache(model.text)
        self._decoders = _threads("decode", settings.decoders, 1)
        self._texts = _threads("text", 1, settings.threads)
        self._images = _threads("image", 1, settings.threads)
        self._probes = _threads("probe", max(1, settings.probes), max(1, settings.threads // 2), yielding=True)
        self._batcher = Batcher(
            model.image, self._images, settings.batch, lambda size: metrics.observe("pmgaft_batch_images", size)
        )
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
        watch = Stopwatch()
        try:
            self._admit(incoming)
        except PmgaftError as error:
            self._metrics.count("pmgaft_rejected_total", reason=error.code)
            return self._refuse(error, incoming, watch)
        self._change_in_flight(1)
        try:
            return await self._serve(incoming, watch)
        except PmgaftError as error:
            if error.code in ("probe_busy", "probe_disabled"):
                self._metrics.count("pmgaft_rejected_total", reason=error.code)
            return self._refuse(error, incoming, watch)
        except Exception as error:
            return self._refuse(PmgaftError(str(error), code="internal"), incoming, watch)
        finally:
            self._change_in_flight(-1)

    def warm_up(self) -> None:
        """Run every encoder a few times, so that the first request finds compiled code and filled caches."""
        height, width = self.model.preprocess.size
        for size in (1, 1, 2):
            self._images.submit(self.model.image, torch.zeros(size, 3, height, width)).result()
        self._texts.submit(self._cache.features, ("warm", "up"), DEFAULT_TEMPLATES).result()
        if self.settings.probes:
            self._probes.submit(self._warm_gradient).result()

    def close(self) -> None:
        """End the threads once their work is done."""
        for threads in (self._decoders, self._texts, self._images, self._probes):
            threads.shutdown()

    def _warm_gradient(self) -> None:
        height, width = self.model.preprocess.size
        for _ in range(2):
            pixels = torch.full((1, 3, height, width), 0.5, requires_grad=True)
            torch.autograd.grad(self.model.gradient(pixels).sum(), pixels)

    def _admit(self, incoming: Incoming) -> None:
        if self.settings.token is not None and not _same_token(incoming.authorization, self.settings.token):
            message = "this server asks for a token: send the header Authorization: Bearer TOKEN"
            raise PmgaftError(message, code="token_invalid")
        if self._draining():
            raise PmgaftError("the server is stopping and takes no new requests", code="draining")
        if self._in_flight >= self.settings.requests:
            raise PmgaftError(f"the server is full: {self._in_flight} requests are in work", code="overloaded")

    async def _serve(self, incoming: Incoming, watch: Stopwatch) -> Reply:
        request = await self._parse(incoming, watch)
        self._metrics.observe("pmgaft_labels_per_request", len(request.labels))
        with self._probe_turn(request):
            images = await self._decode(request, watch)
            text = await self._text(request, watch)
            answers = await asyncio.gather(*(self._predict(image, text, request, watch) for image in images))
            results = [_result(answer, request.top_k) for answer in answers]
            good = [
                (image, answer[0], result)
                for image, answer, result in zip(images, answers, results, strict=True)
                if isinstance(image, Tensor) and isinstance(answer, list)
            ]
            await self._probe(request, good, text, watch)
        return self._reply(request, results, incoming, watch)

    async def _parse(self, incoming: Incoming, watch: Stopwatch) -> Request:
        with watch("decode"):
            return await self._in(
                self._decoders, protocol.parse, incoming.content_type, incoming.fields, self.settings.limits
            )

    async def _decode(self, request: Request, watch: Stopwatch) -> list[Tensor | PmgaftError]:
        """Each image's pixels [3, H, W]; of several, those that fail are their errors."""
        with watch("decode"):
            return await asyncio.gather(*(self._in(self._decoders, self._pixels, image) for image in request.images))

    def _pixels(self, image: bytes | PmgaftError) -> Tensor | PmgaftError:
        """Runs in a decoding thread."""
        if isinstance(image, PmgaftError):
            return image
        try:
            return to_pixels(open_image(image, self.settings.limits.image), self.model.preprocess)
        except Exception as error:
            return _own_error(error)

    async def _text(self, request: Request, watch: Stopwatch) -> Tensor:
        """The labels' features [K, D]; only unknown labels wait for the text encoder."""
        with watch("text"):
            known = self._cache.look_up(request.labels, request.templates)
            self._metrics.count("pmgaft_label_cache_hits_total", len(known.features))
            self._metrics.count("pmgaft_label_cache_misses_total", len(known.missing))
            features = known.features
            if known.missing:
                features |= await self._in(self._texts, self._cache.fill, known.missing, request.templates)
            return torch.stack([features[label] for label in request.labels])

    async def _predict(
        self, image: Tensor | PmgaftError, text: Tensor, request: Request, watch: Stopwatch
    ) -> list[Prediction] | PmgaftError:
        """All labels for one image, the most probable first; or, where it is one of several, its error."""
        try:
            if isinstance(image, PmgaftError):
                raise image
            features = await self._encode(image, watch)
            with watch("rank"):
                return _rank(features, text, self.model.logit_scale, request.labels)
        except Exception as error:
            if not request.several:
                raise
            return _own_error(error)

    async def _encode(self, pixels: Tensor, watch: Stopwatch) -> Tensor:
        """Unit features [D] of pixels [3, H, W], by the served engine."""
        start = time.perf_counter()
        features, waited = await self._batcher(pixels)
        watch.add("queue", waited)
        watch.add("image", time.perf_counter() - start - waited)
        return features

    @contextmanager
    def _probe_turn(self, request: Request) -> Iterator[None]:
        """Room for this request's probe, if it asks for one. Raises: PmgaftError (probe_busy, probe_disabled)."""
        if request.probe is None:
            yield
            return
        if not self.settings.probes:
            raise PmgaftError("this server answers no probes", field="probe", code="probe_disabled")
        if self._probing >= self.settings.probes + self.settings.probe_queue:
            message = f"{self._probing} probes are already running or waiting; try again soon, or without a probe"
            raise PmgaftError(message, field="probe", code="probe_busy")
        self._probing += 1
        try:
            yield
        finally:
            self._probing -= 1

    async def _probe(
        self, request: Request, targets: Sequence[tuple[Tensor, Prediction, Result]], text: Tensor, watch: Stopwatch
    ) -> None:
        """Attack images [3, H, W] together, if the request asks for it, and add to each one's result what was found."""
        if request.probe is None or not targets:
            return
        settings = self._probe_settings(request.probe)
        with watch("probe"):
            reports = await self._in(self._probes, self._attack, [image for image, _, _ in targets], text, settings)
        for report, (_, clean, result) in zip(reports, targets, strict=True):
            served = await self._served_answer(report, text, request, watch)
            answer = probe_answer(report, request.labels, clean, served)
            self._metrics.count("pmgaft_probes_total", verdict=answer.verdict, eps=eps_label(settings.threat.eps))
            self._metrics.observe("pmgaft_probe_seconds", report.seconds, verdict=answer.verdict)
            self._metrics.count("pmgaft_probe_gradients_total", report.gradients)
            result.probe = answer

    def _probe_settings(self, options: ProbeOptions) -> ProbeSettings:
        return ProbeSettings(
            threat=options.threat,
            steps=options.steps,
            restarts=options.restarts,
            step_size=options.step_size,
            seed=options.seed,
            seconds=self.settings.probe_seconds,
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
        return _rank(features, text, self.model.logit_scale, request.labels)[0]

    def _reply(self, request: Request, results: Sequence[Result], incoming: Incoming, watch: Stopwatch) -> Reply:
        common: dict[str, Any] = {
            "note": NOTE_ONE_LABEL if len(request.labels) == 1 else NOTE,
            "model": self.model.info,
            "timing_ms": watch.milliseconds(),
            "request_id": incoming.request_id,
        }
        answer: protocol.Answer | protocol.Answers
        if request.several:
            answer = protocol.Answers(results=list(results), **common)
        else:
            answer = protocol.Answer(predictions=results[0].predictions or [], probe=results[0].probe, **common)
        partial = any(result.error for result in results)
        self._record("partial" if partial else "ok", "ok", watch)
        return Reply(status=200, body=answer.model_dump_json(exclude_none=True).encode(), headers={})

    def _refuse(self, error: PmgaftError, incoming: Incoming, watch: Stopwatch) -> Reply:
        body = protocol.error_body(error)
        status = STATUS[body.code]
        if status == 500:
            logger.error("request %s failed", incoming.request_id, exc_info=error.__cause__ or error)
        self._record("refused" if status < 500 else "failed", body.code, watch)
        wait = protocol.RETRY_AFTER_SECONDS.get(body.code)
        answer = protocol.ErrorAnswer(error=body, request_id=incoming.request_id)
        return Reply(
            status=status,
            body=answer.model_dump_json(exclude_none=True).encode(),
            headers={} if wait is None else {"Retry-After": str(wait)},
        )

    def _record(self, outcome: str, code: str, watch: Stopwatch) -> None:
        self._metrics.count("pmgaft_requests_total", outcome=outcome, code=code)
        self._metrics.observe("pmgaft_request_seconds", time.perf_counter() - watch.start, outcome=outcome)
        for stage, seconds in watch.stages.items():
            self._metrics.observe("pmgaft_stage_seconds", seconds, stage=stage)

    def _change_in_flight(self, by: int) -> None:
        self._in_flight += by
        self._metrics.set("pmgaft_in_flight_requests", self._in_flight)

    async def _in(self, threads: Executor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


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
    elif served is not None and served.label == clean.label:
        verdict = "inconclusive"
        reason = "the adversarial image fools the attacked encoder and not the engine that serves"
    settings = report.settings
    return ProbeAnswer(
        verdict=verdict,
        reason=reason,
        statement=_statement(verdict, reason, report, clean, served),
        threat_model=settings.threat.to_json(),
        attack={
            "name": "pgd",
            "steps": settings.steps,
            "restarts": settings.restarts,
            "step_size": format_eps(settings.budget().step_for(settings.threat.eps)),
            "seed": settings.seed,
        },
        clean=Adversarial(label=clean.label, probability=clean.probability),
        adversarial=None if served is None else Adversarial(label=served.label, probability=served.probability),
        gradients=report.gradients,
        forwards=report.forwards,
        zero_gradient_share=round(report.zero_gradient_share, 6),
        seconds=round(report.seconds, 3),
    )


def _statement(
    verdict: str, reason: str | None, report: ProbeReport, clean: Prediction, served: Prediction | None
) -> str:
    threat = report.settings.threat
    if verdict == "broken" and served is not None:
        return f"an image within {threat} changes this answer from {clean.label!r} to {served.label!r}"
    if verdict == "not_broken":
        tried = f"this attack, with {report.gradients} gradients,"
        return f"{tried} found no image within {threat} that changes the answer {clean.label!r}; others may exist"
    return f"nothing can be said about images within {threat}: {reason}"


def _rank(features: Tensor, text: Tensor, logit_scale: float, labels: Sequence[str]) -> list[Prediction]:
    """All labels from the most to the least probable, equal ones in the request's order."""
    similarity = text @ features
    order: list[int] = similarity.argsort(descending=True, stable=True).tolist()
    probability = (logit_scale * similarity).softmax(dim=0)
    return [
        Prediction(
            label=labels[i], probability=round(float(probability[i]), 6), similarity=round(float(similarity[i]), 6)
        )
        for i in order
    ]


def _result(answer: list[Prediction] | PmgaftError, top_k: int | None) -> Result:
    if isinstance(answer, PmgaftError):
        return Result(error=protocol.error_body(answer))
    return Result(predictions=answer[:top_k])


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
