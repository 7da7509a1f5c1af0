"""The request, the answer and the mistakes of the HTTP interface: written down here once, for every front end.

A front end hands over what it received (`parse`: JSON bytes or form fields) and gets a `Request`, or an error whose
`code` is one of `STATUS`. `openapi()` is made from the same models.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema

from pmgaft import __version__
from pmgaft.clip.preprocess import ImageLimits
from pmgaft.clip.text import DEFAULT_TEMPLATES, check_labels, fill
from pmgaft.errors import InputError, LabelsError, PmgaftError, quote

from . import probe_protocol
from .label_sets import MARK, LabelSet, templates_from
from .probe_protocol import ProbeAnswer, ProbeModel, ProbeOptions, only_eps, probe_options

LabelSets = Mapping[str, LabelSet]
NO_SETS: LabelSets = {}

PATH = "/predictions/pmgaft"

STATUS: dict[str, int] = {
    # 400: malformed
    "request_empty": 400,
    "json_invalid": 400,
    "text_invalid": 400,
    "base64_invalid": 400,
    "field_unknown": 400,
    "field_invalid": 400,
    "image_missing": 400,
    "images_ambiguous": 400,
    "labels_missing": 400,
    "label_not_string": 400,
    # 401: not allowed
    "token_invalid": 401,
    # 413: too large
    "request_too_large": 413,
    "image_too_large": 413,
    "image_too_many_pixels": 413,
    "images_too_many_pixels": 413,
    # 415: not something this server reads
    "content_type_unsupported": 415,
    "image_invalid": 415,
    "image_unsupported": 415,
    # 422: well-formed, and impossible
    "image_empty": 422,
    "image_truncated": 422,
    "images_empty": 422,
    "images_too_many": 422,
    "labels_empty": 422,
    "labels_too_few": 422,
    "labels_too_many": 422,
    "labels_duplicate": 422,
    "label_set_unknown": 422,
    "label_empty": 422,
    "label_too_long": 422,
    "template_invalid": 422,
    "templates_too_many": 422,
    "texts_too_many": 422,
    "tokens_too_many": 422,
    "top_k_invalid": 422,
    "answer_too_large": 422,
    # 503: not now; with Retry-After
    "overloaded": 503,
    "draining": 503,
    "out_of_memory": 503,
    # 500: our mistake
    "internal": 500,
} | probe_protocol.STATUS
"""Every error code an answer can carry, and its HTTP status."""

RETRY_AFTER_SECONDS: dict[str, int] = {"overloaded": 1, "draining": 10, "out_of_memory": 5}
"""For probes that are refused for now, it is known when to come back (`probing.LaterError`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for.

    request_bytes: of the whole body; answer_bytes: of the answer's. image: of each; `decoded` of all together. texts:
    labels times templates that the server has not seen before; tokens: those texts times the longest one's; fewer
    beside large images (`tokens_beside`). labels: in a list; those of a named set are the operator's affair. The
    defaults keep what the dearest request without a probe costs below a hundred times the cheapest
    (benchmarks/amplification.py). probe_images, probe_labels: of a request that asks for a probe. steps, restarts: of
    a probe, for each loss. targets: answers with a search of their own. square: queries without gradients. draws:
    noisy images of a certificate.
    """

    request_bytes: int = 16 * 2**20
    answer_bytes: int = 8 * 2**20
    image: ImageLimits = field(default_factory=lambda: ImageLimits(bytes=12 * 2**20, decoded=2**24))
    images: int = 16
    labels: int = 1000
    label_characters: int = 300
    templates: int = 100
    texts: int = 10_000
    tokens: int = 20 * 2**10
    probe_images: int = 16
    probe_labels: int = 1000
    steps: int = 200
    restarts: int = 10
    targets: int = 10
    square: int = 500
    draws: int = 1000

    def tokens_beside(self, pixels: int) -> int:
        """New tokens that a request may have beside this many pixels to decode: its cost is bounded as a whole. The
        largest image leaves a tenth.
        """
        return self.tokens - round(0.9 * self.tokens * min(1.0, pixels / self.image.decoded))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that can be tried. An image that could not even be read from the body is its error.

    several: asked as a list, and so answered as one. label_set: the name of the set the labels are, if they are one.
    """

    images: tuple[bytes | PmgaftError, ...]
    several: bool
    labels: tuple[str, ...]
    label_set: str | None
    templates: tuple[str, ...]
    top_k: int | None
    probe: ProbeOptions | None
    lint: bool


class RequestModel(BaseModel):
    """A picture (or several) and the labels to rank for it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = Field(None, description="The image file, in base64.")
    images: list[str] | None = Field(None, description="Several image files, in base64; the answer has `results`.")
    labels: list[str] | str = Field(
        description='The answer\'s probabilities are over these alone. "@NAME" is a set that the server knows.'
    )
    templates: list[str] | str | None = Field(
        None,
        description='Prompts with one "{}" for the label, averaged; or the name of a standard set, such as "imagenet". '
        f"By default the label set's own, else {json.dumps(list(DEFAULT_TEMPLATES))}.",
    )
    top_k: int | None = Field(None, ge=1, description="How many predictions to answer; all by default.")
    probe: Annotated[
        ProbeModel | None, BeforeValidator(only_eps, json_schema_input_type=ProbeModel | str | float | None)
    ] = None
    lint: bool = Field(False, description="Also name labels that are hard to tell apart, whatever the picture.")


class Prediction(BaseModel):
    """One label: its probability among the request's labels, and the cosine of image and label."""

    label: str
    probability: float
    similarity: float


class ModelInfo(BaseModel):
    """Which model answered."""

    name: str
    bundle: str
    engine: str
    format: str


class ErrorBody(BaseModel):
    """What was wrong, where, and what would be right; `code` is one of a closed list."""

    code: str
    message: str
    field: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that was refused or failed."""

    error: ErrorBody
    request_id: str


class TorchServeError(BaseModel):
    """What TorchServe answers by itself to what never reaches this server's code, such as a form without boundary."""

    code: int
    type: str
    message: str


class Result(BaseModel):
    """One image of several: its predictions, or its error."""

    predictions: list[Prediction] | None = None
    probe: ProbeAnswer | None = None
    error: ErrorBody | None = None


class LintFinding(BaseModel):
    """Two labels that are hard to tell apart. wordings: their distance, in distances of two wordings of one label."""

    kind: Literal["near_synonyms", "overlap"]
    labels: list[str]
    similarity: float
    wordings: float
    statement: str


class Answer(BaseModel):
    """The answer to one image: labels from the most to the least probable."""

    predictions: list[Prediction]
    probe: ProbeAnswer | None = None
    lint: list[LintFinding] | None = None
    note: str
    model: ModelInfo
    timing_ms: dict[str, float]
    request_id: str


class Answers(BaseModel):
    """The answer to several images, in their order."""

    results: list[Result]
    lint: list[LintFinding] | None = None
    note: str
    model: ModelInfo
    timing_ms: dict[str, float]
    request_id: str


def parse_json(data: bytes, limits: Limits, sets: LabelSets = NO_SETS) -> Request:
    """A JSON body -> Request. Raises: PmgaftError with a code of STATUS."""
    _check_size(len(data), limits)
    if not data.strip():
        raise InputError("the request has no body; send JSON or a form", code="request_empty")
    raw = _load_json(data, "the body")
    if not isinstance(raw, dict):
        raise InputError("the body must be a JSON object", code="json_invalid")
    model = _validate(raw)
    if model.image is not None and model.images is not None:
        raise InputError("send either image or images", field="images", code="images_ambiguous")
    if model.images is None:
        images: list[bytes | PmgaftError] = [_base64(model.image, "image")] if model.image is not None else []
        return _request(model, images, several=False, limits=limits, sets=sets)
    _check_count(len(model.images), limits)
    images = [_base64_or_error(text, f"images.{number}") for number, text in enumerate(model.images)]
    return _request(model, images, several=True, limits=limits, sets=sets)


def parse_form(fields: Mapping[str, bytes], limits: Limits, sets: LabelSets = NO_SETS) -> Request:
    """The fields of a multipart form, by name -> Request. Raises: PmgaftError with a code of STATUS.

    `labels` and `templates` are JSON lists, or labels separated by commas and a single template; `probe` is a JSON
    object or just an eps. Names must be distinct: TorchServe keeps only the last of equal ones.
    """
    _check_size(sum(map(len, fields.values())), limits)
    _check_text("field names", list(fields))
    numbered = {name: value for name, value in fields.items() if re.fullmatch(r"image\.\d{1,4}", name)}
    raw = {name: _form_value(name, value) for name, value in fields.items() if name != "image" and name not in numbered}
    if "images" in raw:
        raise InputError(
            "in a form, several images are files named image.0, image.1, ...", field="images", code="field_unknown"
        )
    model = _validate(raw)
    if "image" in fields and numbered:
        raise InputError("send either image or image.0, image.1, ...", field="image", code="images_ambiguous")
    if not numbered:
        return _request(model, [fields["image"]] if "image" in fields else [], several=False, limits=limits, sets=sets)
    _check_count(len(numbered), limits)
    images = [numbered[name] for name in sorted(numbered, key=lambda name: int(name.partition(".")[2]))]
    return _request(model, images, several=True, limits=limits, sets=sets)


def parse(content_type: str | None, fields: Mapping[str, bytes], limits: Limits, sets: LabelSets = NO_SETS) -> Request:
    """What a front end received -> Request. fields: the form's fields, or the whole body under the name "body".

    content_type: None or empty where the front end has no such thing (gRPC); then what was sent decides.
    sets: label sets by name.
    Raises: PmgaftError with a code of STATUS.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    body = fields.get("body", b"")
    if kind == "multipart/form-data" or (not kind and "labels" in fields):
        return parse_form(fields, limits, sets)
    if kind == "application/json" or (not kind and body.lstrip()[:1] == b"{") or not any(fields.values()):
        return parse_json(body, limits, sets)
    _check_size(sum(map(len, fields.values())), limits)
    message = f"content type {quote(kind)} is not understood; send application/json or multipart/form-data"
    raise InputError(message, code="content_type_unsupported")


def error_body(error: PmgaftError) -> ErrorBody:
    """What the client is told. A code that is not in STATUS is our own mistake and says nothing of what happened."""
    if error.code not in STATUS or error.code == "internal":
        return ErrorBody(code="internal", message="the server failed on this request; its log says why")
    return ErrorBody(code=error.code, message=error.message, field=error.field)


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.request_bytes:
        message = f"the request has {size:,} bytes; at most {limits.request_bytes:,} are allowed"
        raise InputError(message, code="request_too_large")


def _check_count(count: int, limits: Limits) -> None:
    if count == 0:
        raise InputError("the list of images is empty", field="images", code="images_empty")
    if count > limits.images:
        message = f"{count} images are too many; at most {limits.images} are allowed"
        raise InputError(message, field="images", code="images_too_many")


def _load_json(data: bytes, what: str, field: str | None = None) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 text (byte {error.start})", field=field, code="text_invalid") from None
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        message = f"{what} is not JSON: line {error.lineno}, column {error.colno}"
        raise InputError(message, field=field, code="json_invalid") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        raise InputError(f"{what} is not JSON that can be read", field=field, code="json_invalid") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    _check_text("field names", list(content))
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the field {quote(twice)} is there twice", field=_short(twice), code="json_invalid")
    return content


def _form_value(name: str, value: bytes) -> Any:
    """A form field as the JSON value it stands for."""
    short = _short(name)
    try:
        text = value.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{short} is not UTF-8 text (byte {error.start})", field=short, code="text_invalid") from None
    if text[:1] in ("[", "{") and name in ("labels", "templates", "probe") and (name != "templates" or text[:1] == "["):
        return _load_json(value, short, short)
    if name == "labels":
        if text.startswith(MARK) and "," not in text:
            return text
        return [label.strip() for label in text.split(",")] if text else []
    if name == "lint" and text in ("true", "false"):
        return text == "true"
    if name == "top_k" and re.fullmatch(r"-?\d{1,9}", text):
        return int(text)
    return text


def _base64(text: str, field: str) -> bytes:
    compact = (
        "".join(text.removeprefix("data:image/").partition(";base64,")[2].split())
        if text.startswith("data:")
        else ("".join(text.split()))
    )
    try:
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{field} is not base64", field=field, code="base64_invalid") from None


def _base64_or_error(text: str, field: str) -> bytes | PmgaftError:
    try:
        return _base64(text, field)
    except PmgaftError as error:
        return error


_RIGHT = {
    "image": "a string with the image file in base64",
    "images": "a list of strings, each an image file in base64",
    "labels": "a list of strings",
    "templates": 'a list of strings such as "a photo of a {}.", or the name of a standard set such as "imagenet"',
    "lint": "true or false",
    "top_k": "a whole number from 1 upwards",
    "probe": 'an object such as {"eps": "1/255", "steps": 20}, or just "1/255"',
} | probe_protocol.RIGHT


def _validate(raw: dict[str, Any]) -> RequestModel:
    try:
        return RequestModel.model_validate(raw)
    except ValidationError as error:
        # one mistake at a time: the first unknown field, else the first wrong one
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        mistakes.sort(key=lambda mistake: mistake["type"] != "extra_forbidden")
        raise _mistake(mistakes[0]["type"], mistakes[0]["loc"]) from None


def _mistake(kind: str, where: tuple[int | str, ...]) -> InputError:
    """One of pydantic's complaints in our words and codes."""
    if kind != "extra_forbidden":
        where = tuple(part for part in where if isinstance(part, int) or part in _RIGHT)  # without a union's branches
    names = [part for part in where if isinstance(part, str)]
    field = ".".join(_short(str(part)) for part in where)
    if kind == "extra_forbidden":
        known = ProbeModel.model_fields if names[0] == "probe" else RequestModel.model_fields
        close = get_close_matches(names[-1][:40], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        return InputError(f"unknown field {quote(names[-1])}; {hint}", field=field, code="field_unknown")
    name = names[-1]
    if name == "labels":
        if len(where) > 1:
            return InputError(f"label {int(where[1]) + 1} is not a string", field="labels", code="label_not_string")
        return InputError("labels are missing: send a list of strings", field="labels", code="labels_missing")
    codes = {
        "templates": "template_invalid",
        "image": "field_invalid",
        "images": "field_invalid",
        "probe": "field_invalid",
        "lint": "field_invalid",
        **dict.fromkeys(("min_eps", "health", "survival", "return_image"), "field_invalid"),
    }
    return InputError(f"{name} must be {_RIGHT[name]}", field=field, code=codes.get(name, f"{name}_invalid"))


def _request(
    model: RequestModel, images: Sequence[bytes | PmgaftError], *, several: bool, limits: Limits, sets: LabelSets
) -> Request:
    """Check everything that can be checked before an image is decoded."""
    known = _label_set(model.labels, sets) if isinstance(model.labels, str) else None
    labels = known.labels if known else tuple(model.labels)
    if known is None:
        _check_text("labels", labels)
        check_labels(labels, most=limits.labels, longest=limits.label_characters)
    if model.templates is None:
        templates = known.templates if known else DEFAULT_TEMPLATES
    else:
        _check_text("templates", model.templates)
        templates = templates_from(model.templates)
        _check_templates(templates, limits)
    if not images:
        raise InputError("the image is missing", field="image", code="image_missing")
    probe = None if model.probe is None else probe_options(model.probe, labels, templates, len(images), limits)
    return Request(
        images=tuple(images),
        several=several,
        labels=labels,
        label_set=known.name if known else None,
        templates=templates,
        top_k=model.top_k,
        probe=probe,
        lint=model.lint,
    )


def _label_set(text: str, sets: LabelSets) -> LabelSet:
    """The set that "@NAME" calls."""
    if not text.startswith(MARK):
        raise InputError(f"labels must be {_RIGHT['labels']}", field="labels", code="labels_missing")
    name = text.removeprefix(MARK)
    if name in sets:
        return sets[name]
    close = get_close_matches(name[:60], sets, 1)
    hint = f"did you mean {MARK}{close[0]}?" if close else "pmgaft serve --label-set NAME=FILE makes one"
    raise LabelsError(f"there is no label set {quote(text)} here; {hint}", field="labels", code="label_set_unknown")


def _check_text(name: str, texts: Sequence[str]) -> None:
    if all(map(str.isascii, texts)):
        return
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{name} contain half a surrogate pair", field=name, code="text_invalid")


def _check_templates(templates: Sequence[str], limits: Limits) -> None:
    if not templates:
        raise InputError("at least one template is needed", field="templates", code="template_invalid")
    if len(templates) > limits.templates:
        message = f"{len(templates)} templates are too many; at most {limits.templates} are allowed"
        raise InputError(message, field="templates", code="templates_too_many")
    for template in templates:
        if len(template) > limits.label_characters:
            most = limits.label_characters
            message = f"template {quote(template)} has {len(template)} characters; at most {most} are allowed"
            raise InputError(message, field="templates", code="template_invalid")
        fill(template, "")


def _short(name: str) -> str:
    """A field's name as far as it may be repeated to the client."""
    return name if len(name) <= 40 else name[:40] + "..."


_ERRORS = (ErrorAnswer, TorchServeError)
TOO_SLOW = 408
"""What is answered to a request that does not arrive whole in time; it never gets to this server's code."""


def openapi(server: str = "http://127.0.0.1:8080") -> dict[str, Any]:
    """The OpenAPI 3.1 document of this interface."""
    models = [(RequestModel, "validation"), *((model, "serialization") for model in (Answer, Answers, *_ERRORS))]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = definitions["$defs"]
    schemas["ErrorBody"]["properties"]["code"]["enum"] = list(STATUS)
    request = {"$ref": "#/components/schemas/RequestModel"}
    answer = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("Answer", "Answers")]}
    responses: dict[str, Any] = {
        "200": {"description": "Ranked labels.", "content": {"application/json": {"schema": answer}}}
    }
    error = {"anyOf": [{"$ref": f"#/components/schemas/{model.__name__}"} for model in _ERRORS]}
    for status in sorted({*STATUS.values(), TOO_SLOW}):
        codes = [code for code, value in STATUS.items() if value == status]
        content = {"application/json": {"schema": error}}
        description = f"One of: {', '.join(codes)}." if codes else "The request took too long to arrive."
        responses[str(status)] = {"description": description, "content": content}
    form = {
        "type": "object",
        "required": ["labels"],
        "properties": {
            "image": {"type": "string", "contentMediaType": "image/*"},
            "labels": {"type": "string", "description": "A JSON list, labels separated by commas, or @NAME."},
            "templates": {"type": "string", "description": "A JSON list, one template, or a standard set's name."},
            "lint": {"type": "string", "enum": ["true", "false"]},
            "top_k": {"type": "string", "pattern": r"^\d+$"},
            "probe": {"type": "string", "description": 'A JSON object, or just an eps such as "1/255".'},
        },
        "patternProperties": {r"^image\.\d+$": {"type": "string", "contentMediaType": "image/*"}},
        "additionalProperties": False,
    }
    body = {"application/json": {"schema": request}, "multipart/form-data": {"schema": form}}
    operation = {
        "summary": "Rank labels for a picture, and on request attack that answer.",
        "operationId": "classify",
        "requestBody": {"required": True, "content": body},
        "responses": responses,
        "security": [{}, {"token": []}],
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "pmgaft", "version": __version__},
        "servers": [{"url": server}],
        "paths": {PATH: {"post": operation}},
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }
