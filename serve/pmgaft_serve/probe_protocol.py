"""What a request may ask of a probe, and what it is answered: the part of `protocol` under the name `probe`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from pmgaft.clip.text import fill
from pmgaft.errors import InputError, LabelsError, PmgaftError, ThreatError, quote
from pmgaft.probe.attack import check_settings
from pmgaft.probe.settings import ProbeSettings
from pmgaft.threat import Norm, ThreatModel, parse_eps

from .label_sets import templates_from

if TYPE_CHECKING:
    from .protocol import Limits

STATUS: dict[str, int] = {
    # 401, 403: not allowed
    "probe_token_missing": 401,
    "probe_token_invalid": 403,
    "probe_disabled": 403,
    "probe_images_disabled": 403,
    # 422: well-formed, and impossible or too dear
    "eps_invalid": 422,
    "norm_invalid": 422,
    "attack_invalid": 422,
    "losses_invalid": 422,
    "steps_invalid": 422,
    "step_size_invalid": 422,
    "restarts_invalid": 422,
    "seed_invalid": 422,
    "seconds_invalid": 422,
    "target_invalid": 422,
    "targets_invalid": 422,
    "groups_invalid": 422,
    "square_invalid": 422,
    "certify_invalid": 422,
    "draws_invalid": 422,
    "wording_invalid": 422,
    "synonyms_invalid": 422,
    "probe_labels_too_many": 422,
    "probe_images_too_many": 422,
    # 429: not now
    "probe_busy": 429,
    "probe_rate": 429,
}
"""Every error code that only a probe can cause, and its HTTP status."""

RIGHT = {
    "eps": 'a number such as "1/255" or 0.0039',
    "norm": '"linf" or "l2"',
    "attack": '"pgd" or "apgd"',
    "losses": 'a list of "ce", "margin" and "dlr"',
    "steps": "a whole number from 1 upwards",
    "restarts": "a whole number from 1 upwards",
    "step_size": 'a number such as "0.25/255"',
    "seed": "a whole number from 0 to 2147483647",
    "seconds": "a number above 0",
    "target": "one of the labels",
    "targets": "a whole number from 0 upwards",
    "groups": "a list of lists of labels",
    "min_eps": "true or false",
    "health": "true or false",
    "square": "a whole number from 0 upwards",
    "survival": "true or false",
    "certify": "the noise's standard deviation, a number above 0 such as 0.1",
    "draws": "a whole number from 1 upwards",
    "wording": 'a list of templates such as "a photo of a {}.", or the name of a standard set such as "imagenet"',
    "synonyms": "a list of strings",
    "return_image": "true or false",
}
"""What each option must be, in words."""


class ProbeModel(BaseModel):
    """How to attack the image, and what else to say of it.

    Inside `eps` of it, by `steps` gradient steps from each of `restarts` starts, one loss after the other.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    eps: str | int | float = Field("1/255", description="Largest change of a pixel, pixels lying in [0, 1].")
    norm: Literal["linf", "l2"] = "linf"
    attack: Literal["pgd", "apgd"] | None = Field(None, description="By default apgd from 50 steps on, else pgd.")
    losses: list[Literal["ce", "margin", "dlr"]] = Field(
        ["ce", "margin"], min_length=1, max_length=3, description="Climbed in turn while the answer stands."
    )
    steps: int = Field(20, ge=1)
    restarts: int = Field(1, ge=1)
    step_size: str | int | float | None = Field(None, description="In the unit of eps; by default 2.5 eps / steps.")
    seed: int = Field(0, ge=0, le=2**31 - 1)
    seconds: int | float | None = Field(None, gt=0, description="Then the answer is inconclusive; the server's most.")
    target: str | None = Field(None, description="The label that the answer must become; any other by default.")
    groups: list[list[str]] = Field([], description="Labels that count as one answer.")
    min_eps: bool = Field(False, description="Also search the smallest eps that changes the answer.")
    targets: int = Field(0, ge=0, description="Also search it for each of so many of the likeliest other answers.")
    health: bool = Field(False, description="Also check the attack itself.")
    square: int = Field(0, ge=0, description="With health: queries of an attack without gradients.")
    survival: bool = Field(False, description="Also say whether what was found survives rounding, JPEG, resizing.")
    certify: int | float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Also certify an l2 radius, under noise of this deviation."
    )
    draws: int = Field(1000, ge=1, description="With certify: noisy images that are counted.")
    wording: list[str] | str | None = Field(None, description="Other templates to try one at a time; or a set's name.")
    synonyms: list[str] = Field([], description="Other names of the clean answer, each to be tried in its place.")
    return_image: bool = Field(False, description="Also return what was found as PNG, where the server permits it.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """What a request asks of a probe. settings: of the attack; its `seconds` are the request's own, None: the server's.

    sigma: of a certificate, None for none; draws: that count it. wording: templates to be tried one at a time.
    synonyms: of the clean answer.
    """

    settings: ProbeSettings
    survival: bool = False
    sigma: float | None = None
    draws: int = 1000
    wording: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    return_image: bool = False


class Adversarial(BaseModel):
    """The model's first label for the image, or for the attacked image."""

    label: str
    probability: float


class ProbeThreat(BaseModel):
    """Everything a verdict depends on but the picture. eps_value: pixel units. seconds: that the attack had.

    bundle: hash of what is served. labels_sha256: of the label list and the templates, as JSON in their order.
    """

    norm: str
    eps: str
    eps_value: float
    grid: str
    attack: str
    losses: list[str]
    steps: int
    restarts: int
    step_size: str
    target: str | None = None
    groups: list[list[str]]
    precision: str
    seed: int
    seconds: float | None = None
    bundle: str
    labels: int
    templates: int
    labels_sha256: str


class SmallestEps(BaseModel):
    """The smallest change found that changes the answer, an upper bound; eps is missing where none was found.

    failed_eps: the largest smaller eps at which an attempt found nothing. first_order: what a linear model would need.
    confirmed: whether that image changes the answer of the engine that serves, too.
    """

    eps: str | None = None
    eps_value: float | None = None
    label: str | None = None
    confirmed: bool | None = None
    failed_eps: str
    first_order: str | None = None
    resolution: float
    finished: bool
    gradients: int


class TargetEps(BaseModel):
    """The smallest change found that gives this answer; eps is missing where it was not reached."""

    label: str
    eps: str | None = None
    eps_value: float | None = None
    first_order: str | None = None
    gradients: int


class HealthCheck(BaseModel):
    """One look at the attack itself. passed: missing where there was nothing to look at."""

    name: str
    passed: bool | None = None
    said: str


class Treatment(BaseModel):
    """What is left of the image found after one treatment. flips: whether it still changes the answer."""

    treatment: str
    flips: bool
    label: str
    linf_distance: str


class OtherWording(BaseModel):
    """Another template or name, and the answer that it gives."""

    wording: str
    label: str


class WordingAnswer(BaseModel):
    """Another threat than pixels: how many templates, each alone, and names were tried, and those that change it."""

    templates: int
    flipped_by_template: list[OtherWording]
    synonyms: int
    flipped_by_synonym: list[OtherWording]


class CertificateAnswer(BaseModel):
    """Of the smoothed classifier, not of the model itself. label is missing where it abstains; then the radii are 0."""

    of: Literal["the smoothed classifier"] = "the smoothed classifier"
    label: str | None = None
    radius_l2: float
    implied_linf_radius: float
    sigma: float
    draws: int
    count: int
    p_low: float
    confidence: float
    statement: str


class AdversarialImage(BaseModel):
    """A file. flips: whether the engine that serves, given this very file, still answers otherwise."""

    png_base64: str
    flips: bool
    label: str
    linf_distance: str
    note: str


class ProbeAnswer(BaseModel):
    """What an attack on this very answer found, under the stated threat model and budget, and nothing beyond it.

    gradients, forwards: on everything. seconds: of the attack, with others that it shared a batch with. unfinished:
    parts that were asked for and for which there was no time.
    """

    verdict: Literal["broken", "not_broken", "inconclusive"]
    reason: str | None = None
    statement: str
    threat_model: ProbeThreat
    clean: Adversarial
    adversarial: Adversarial | None = None
    distance: str | None = None
    min_eps: SmallestEps | None = None
    targets: list[TargetEps] | None = None
    health: list[HealthCheck] | None = None
    survival: list[Treatment] | None = None
    wording: WordingAnswer | None = None
    certificate: CertificateAnswer | None = None
    image: AdversarialImage | None = None
    unfinished: list[str] | None = None
    attack_gradients: int
    gradients: int
    forwards: int
    zero_gradient_share: float
    seconds: float


def only_eps(value: object) -> object:
    """The short form of a probe: `"1/255"` stands for `{"eps": "1/255"}`."""
    return {"eps": value} if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def labels_hash(labels: Sequence[str], templates: Sequence[str]) -> str:
    """sha256 of both, as JSON; `pmgaft probe --json` writes the same."""
    return hashlib.sha256(json.dumps([labels, templates]).encode()).hexdigest()


def probe_options(
    model: ProbeModel, labels: Sequence[str], templates: Sequence[str], images: int, limits: Limits
) -> ProbeOptions:
    """Everything that can be checked before an image is decoded. Raises: PmgaftError with a code of STATUS."""
    if len(labels) < 2:
        message = "a probe needs at least two labels: with one there is nothing to change the answer to"
        raise LabelsError(message, field="labels", code="labels_too_few")
    _at_most(len(labels), limits.probe_labels, "labels", "probe_labels_too_many", "labels of a probe")
    _at_most(images, limits.probe_images, "images", "probe_images_too_many", "images of a probe")
    for name in ("steps", "restarts", "targets", "square", "draws"):
        _at_most(getattr(model, name), getattr(limits, name), f"probe.{name}", f"{name}_invalid", name)
    wording = () if model.wording is None else _wording(model.wording)
    _at_most(len(wording), limits.templates, "probe.wording", "wording_invalid", "templates to try")
    _at_most(len(model.synonyms), limits.templates, "probe.synonyms", "synonyms_invalid", "synonyms")
    if wording or model.synonyms:
        texts = len(labels) * len({*wording, *templates}) + len(model.synonyms) * len(templates)
        _at_most(texts, limits.texts, "probe.wording", "texts_too_many", "texts to try")
    _check_texts(model.synonyms, "synonyms", limits)
    _check_texts(wording, "wording", limits)
    return ProbeOptions(
        settings=_settings(model, labels),
        survival=model.survival,
        sigma=model.certify,
        draws=model.draws,
        wording=wording,
        synonyms=tuple(model.synonyms),
        return_image=model.return_image,
    )


def _settings(model: ProbeModel, labels: Sequence[str]) -> ProbeSettings:
    step_size = None if model.step_size is None else _radius(model.step_size, model.norm, "step_size")
    if step_size == 0:
        raise ThreatError("step_size must be above 0", field="probe.step_size", code="step_size_invalid")
    if model.target is not None and model.target not in labels:
        message = f"the target {quote(model.target)} is none of the labels"
        raise LabelsError(message, field="probe.target", code="target_invalid")
    threat = ThreatModel(norm=model.norm, eps=_radius(model.eps, model.norm, "eps"))
    groups = _groups(model.groups, {label: place for place, label in enumerate(labels)})

    def settings() -> ProbeSettings:
        asked = ProbeSettings(
            threat=threat,
            steps=model.steps,
            restarts=model.restarts,
            step_size=step_size,
            seed=model.seed,
            seconds=model.seconds,
            algorithm=model.attack,
            losses=tuple(dict.fromkeys(model.losses)),
            target=None if model.target is None else labels.index(model.target),
            groups=groups,
            min_eps=model.min_eps,
            targets=model.targets,
            health=model.health,
            square_queries=model.square if model.health else 0,
        )
        check_settings(asked, len(labels))
        return asked

    return _in_our_words(settings)


def _groups(groups: Sequence[Sequence[str]], places: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    for group in groups:
        for name in group:
            if name not in places:
                message = f"groups name {quote(name)}, which is none of the labels"
                raise LabelsError(message, field="probe.groups", code="groups_invalid")
    return tuple(tuple(places[name] for name in group) for group in groups if group)


def _in_our_words(make: Callable[[], ProbeSettings]) -> ProbeSettings:
    """The science's complaints under the names that the request uses."""
    try:
        return make()
    except PmgaftError as error:
        field = error.field if error.field == "labels" else f"probe.{error.field}"
        code = "losses_invalid" if error.code == "loss_invalid" else error.code
        raise type(error)(error.message, field=field, code=code) from None


def _check_texts(texts: Sequence[str], name: str, limits: Limits) -> None:
    most = limits.label_characters
    for text in texts:
        half = any("\ud800" <= character <= "\udfff" for character in text)  # of a surrogate pair
        if half or not text.strip() or len(text) > most:
            message = f"{name} are texts of 1 to {most} characters, unlike {quote(ascii(text) if half else text)}"
            raise LabelsError(message, field=f"probe.{name}", code=f"{name}_invalid")


def _wording(value: Sequence[str] | str) -> tuple[str, ...]:
    try:
        templates = tuple(dict.fromkeys(templates_from(value)))
        for template in templates:
            fill(template, "")
        return templates
    except LabelsError as error:
        raise LabelsError(error.message, field="probe.wording", code="wording_invalid") from None


def _at_most(value: int, most: int, field: str, code: str, what: str) -> None:
    if value > most:
        message = f"{what}: {quote(value)} is too much; at most {most:,} are allowed"
        raise InputError(message, field=field, code=code)


def _radius(value: str | float, norm: Norm, name: str) -> float:
    try:
        return parse_eps(value, norm)
    except ThreatError as error:
        message = error.message.replace("eps", name, 1)
        raise ThreatError(message, field=f"probe.{name}", code=f"{name}_invalid") from None
