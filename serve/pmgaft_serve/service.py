"""Requests in, answers out: admission, decoding, label features, batched encoding, ranking, probes. Knows no front end.

A request passes these stages, each where it delays nobody:

    admission   on the event loop: token, room in the queue; refused here at once
    decode      in a pool of threads: the body, then each image to pixels
    text        known labels from the cache on the loop; unknown ones of all requests are encoded together in a thread
    image       in the encoder's thread, in batches that form while it is busy: a lone request waits for nobody; on a
                CPU in two threads, a batch in each
    rank        on the loop: one small matrix product
    probe       in a thread of its own, of lower priority, each step between plain requests (`probing`); and of a share
                of what was answered without one, once the answer has left (`sampling`)

Letters: K labels, D features, H, W. All methods of Service run on one event loop.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pmgaft import __version__
from pmgaft.clip.lint import lint, wording_distance
from pmgaft.clip.preprocess import PlannedImage, plan_image, read_pixels, read_planned
from pmgaft.errors import InputError, PmgaftError

from . import probing, protocol
from .batching import Batcher
from .engines import LANES
from .label_sets import LabelSet
from .metrics import STAGES, Metrics
from .model import Model
from .probing import LaterError, ProbePolicy, Prober, Target, same_token
from .protocol import STATUS, Limits, LintFinding, Prediction, Request, Result
from .ranking import rank
from .sampling import Sample, SamplePolicy, Sampler
from .texts import Texts
from .threads import thread_pool

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
    requests: accepted and unanswered at most; more are refused with 503. batch: images encoded at once, in all threads.
    threads: of the encoder; decoders: threads that decode. cache_bytes: of label features. probe: who may probe, and
    how much; sample: the share of ordinary traffic that is probed.
    """

    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    requests: int = 64
    batch: int = 32
    threads: int = 1
    decoders: int = 2
    cache_bytes: int = 256 * 2**20
    probe: ProbePolicy = field(default_factory=ProbePolicy)
    sample: SamplePolicy = field(default_factory=SamplePolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A request as a front end has it. fields: form fields by name, or the whole body under the name "body"."""

    fields: Mapping[str, bytes]
    content_type: str | None = None
    authorization: str | None = None
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A finished answer: JSON bytes, an HTTP status, and headers beside the content type."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as it is logged: what happened and how much of it, nothing of what it was about.

    traceparent: the client's, of W3C Trace Context, "" where none was sent. outcome: ok, partial, refused or failed.
    code: "ok" or the error's. milliseconds: by stage, and in total.
    bytes_in, bytes_out: of the bodies. labels, templates, images: how many, 0 where the request could not be read.
    """

    id: str
    traceparent: str
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
    """One request on its way through. request: once it could be read. pixels: of all its images, to decode. samples: of
    its images, to be probed later.
    """

    incoming: Incoming
    watch: Stopwatch = field(default_factory=Stopwatch)
    request: Request | None = None
    pixels: int = 0
    samples: list[Sample] = field(default_factory=list)


class Service:
    """One model's requests, answered. Made on the event loop's thread; `answer` is the whole interface.

    draining: asked at each arrival; true means that no new request is taken. on_answered: told of every answer.
    sets: label sets that requests may call by name. warm: label lists to be known from the start. chance: draws the
    sample.
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
        chance: random.Random | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self._metrics = metrics
        self._draining = draining
        self._on_answered = on_answered
        self._sets = {one.name: one for one in sets}
        self._warm = warm
        self._in_flight = 0
        self._decoders = thread_pool("decode", settings.decoders, 1)
        lanes = 1 if model.lane is None else LANES
        torch_threads = settings.threads if model.lane is None else 1  # ONNX Runtime has threads of its own
        self._text_thread = thread_pool("text", 1, torch_threads)
        self._image_threads = thread_pool("image", lanes, torch_threads)
        self._texts = Texts(
            model.text,
            self._text_thread,
            metrics,
            most_bytes=settings.cache_bytes,
            most_texts=settings.limits.texts,
            most_tokens=settings.limits.tokens,
        )
        self._images = Batcher(
            self._encode_batch,
            self._image_threads,
            max(1, settings.batch // lanes),
            lambda size: metrics.observe("pmgaft_batch_images", size),
            lambda images: metrics.set("pmgaft_queue_images", images),
            lanes,
        )
        self._prober = Prober(
            model,
            settings.probe,
            metrics,
            self._texts,
            self._encode_quietly,
            threads=settings.threads,
        )
        self._sampler = Sampler(
            settings.sample,
            self._prober.attack,
            self._encode_quietly,
            lambda: self._prober.in_work > 0,
            metrics,
            chance or random.Random(),
            seconds=settings.probe.seconds,
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
            if error.code in probing.REFUSALS:
                self._metrics.count("pmgaft_rejected_total", reason=error.code)
            return self._refuse(error, job)
        except Exception as error:
            return self._refuse(PmgaftError(str(error), code="internal"), job)
        else:
            self._record(job, reply, "partial" if partial else "ok", "ok")
            for sample in job.samples:
                self._sampler.offer(sample)
            return reply
        finally:
            self._change_in_flight(-1)
            self._sampler.wake()

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
                for encode in filter(None, (self.model.image, self.model.lane)):
                    await self._in(self._image_threads, encode, torch.zeros(size, 3, height, width))
        large = _jpeg(4 * width, 4 * height)  # that is scaled while it is decoded
        everyone = (self._in(self._decoders, read_pixels, large, self.model.preprocess) for _ in range(32))
        pixels = await asyncio.gather(*everyone)
        fields = {"image": _jpeg(8, 8), "labels": _WARM_UP_LABELS.labels[0].encode()}
        for _ in range(2):
            await self._serve(_Job(Incoming(fields=fields, content_type="multipart/form-data")))
        if self.settings.probe.allow != "off" or self.settings.sample.rate:
            text = await self._texts.features(_WARM_UP_LABELS.labels, _WARM_UP_LABELS.templates)
            await self._prober.warm_up(pixels[0], text)

    def close(self) -> None:
        """End the threads once their work is done."""
        self._sampler.close()
        self._prober.close()
        for threads in (self._decoders, self._text_thread, self._image_threads):
            threads.shutdown()

    def _admit(self, incoming: Incoming) -> None:
        tokens = (self.settings.token, self.settings.probe.token)
        if self.settings.token is not None and not any(same_token(incoming.authorization, token) for token in tokens):
            message = "this server asks for a token: send the header Authorization: Bearer TOKEN"
            raise PmgaftError(message, code="token_invalid")
        if self._draining():
            raise PmgaftError("the server is stopping and takes no new requests", code="draining")
        if self._in_flight >= self.settings.requests:
            raise PmgaftError(f"the server is full: {self._in_flight} requests are in work", code="overloaded")

    async def _serve(self, job: _Job) -> tuple[Reply, bool]:
        """A request's answer, and whether some of several images failed."""
        request, images = await self._read(job)
        with self._prober.turn(request, job.incoming.authorization):
            text = await self._text(request, job)
            predicted = await _all(
                [self._predict(image, turn, text, request, job.watch) for turn, image in enumerate(images)]
            )
            results = [_result(answer, request) for answer in predicted]
            good = [
                (Target(pixels=image, clean=answer[0]), result)
                for image, answer, result in zip(images, predicted, results, strict=True)
                if isinstance(image, Tensor) and isinstance(answer, list)
            ]
            if request.probe is None:
                job.samples = self._drawn(request, [target for target, _ in good], text)
            else:
                with job.watch("probe"):
                    found = await self._prober.answers(request, [target for target, _ in good], text)
                for answer, (_, result) in zip(found, good, strict=True):
                    result.probe = answer
        findings = await self._lint(request, text, job.watch)
        return self._reply(request, results, findings, job), any(result.error for result in results)

    async def _read(self, job: _Job) -> tuple[Request, list[Tensor | PmgaftError]]:
        """The request, and each image's pixels [3, H, W]; of several images, those that fail are their errors."""
        with job.watch("decode"):
            request, planned, first = await self._in(self._decoders, self._open, job)
            others = (self._in(self._decoders, self._pixels, image) for image in planned[1:])
            return request, [first, *await _all(list(others))]

    def _open(self, job: _Job) -> tuple[Request, list[PlannedImage | PmgaftError], Tensor | PmgaftError]:
        """The request, its images' headers, and its first image's pixels, by one visit to a decoding thread."""
        incoming = job.incoming
        request = protocol.parse(incoming.content_type, incoming.fields, self.settings.limits, self._sets)
        job.request = request
        self._prober.check(request, incoming.authorization)  # before more is spent on it
        planned = [self._planned(image) for image in request.images]
        job.pixels = sum(image.pixels_to_decode for image in planned if isinstance(image, PlannedImage))
        if job.pixels > (most := self.settings.limits.image.decoded):
            message = f"the images have {job.pixels:,} pixels to decode; at most {most:,} are allowed together"
            raise InputError(message, field="images", code="images_too_many_pixels")
        return request, planned, self._pixels(planned[0])

    def _planned(self, image: bytes | PmgaftError) -> PlannedImage | PmgaftError:
        if isinstance(image, PmgaftError):
            return image
        self._metrics.observe("pmgaft_image_bytes", len(image))
        try:
            return plan_image(image, self.model.preprocess, self.settings.limits.image)
        except Exception as error:
            return _own_error(error)

    def _pixels(self, image: PlannedImage | PmgaftError) -> Tensor | PmgaftError:
        """Runs in a decoding thread."""
        if isinstance(image, PmgaftError):
            return image
        try:
            return read_planned(image, self.model.preprocess)
        except Exception as error:
            return _own_error(error)

    async def _text(self, request: Request, job: _Job) -> Tensor:
        """The labels' features [K, D]; only unknown labels wait for the text encoder."""
        most_tokens = self.settings.limits.tokens_beside(job.pixels)
        with job.watch("text"):
            return await self._texts.features(request.labels, request.templates, request.label_set, most_tokens)

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

    async def _encode_quietly(self, pixels: Tensor) -> Tensor:
        """As `_encode`, of no stage of a request."""
        return (await self._images(pixels))[0]

    def _drawn(self, request: Request, targets: Sequence[Target], text: Tensor) -> list[Sample]:
        """Which images of a request without a probe will be probed in the background."""
        if len(request.labels) < 2:
            return []
        return [
            Sample(pixels=target.pixels, text=text, clean=request.labels.index(target.clean.label))
            for target in targets
            if self._sampler.draw()
        ]

    def _encode_batch(self, pixels: Sequence[Tensor]) -> list[Tensor | Exception]:
        """Runs in an encoder's thread: a batch that has the machine for itself takes all of it."""
        encode = self.model.image if self.model.lane is None or self._images.running == 1 else self.model.lane
        features = encode(torch.stack(list(pixels)))
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
            self._wording = wording_distance(self.model.text.encode)
        return self._wording

    def _reply(
        self, request: Request, results: Sequence[Result], findings: list[LintFinding] | None, job: _Job
    ) -> Reply:
        common: dict[str, Any] = {
            "lint": findings,
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
        wait = error.retry_after if isinstance(error, LaterError) else protocol.RETRY_AFTER_SECONDS.get(body.code)
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
                traceparent=job.incoming.traceparent,
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
        self._prober.pause.change(by)
        self._metrics.set("pmgaft_in_flight_requests", self._in_flight)

    async def _in(self, threads: Executor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


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
