"""The whole report on an image: the probe, what survives, the certificate, the wordings; as one JSON document."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmgaft.clip.preprocess import PreprocessSpec, read_pixels
from pmgaft.clip.text import label_features
from pmgaft.errors import LabelsError, quote
from pmgaft.probe.certificate import Certificate, certify, noisy_features
from pmgaft.probe.report import MinEps, ProbeReport
from pmgaft.probe.run import probe
from pmgaft.probe.settings import ProbeSettings, eps_text
from pmgaft.probe.surface import Groups, leads_of
from pmgaft.probe.survival import difference_picture, picture_of, survivals, surviving_pixels
from pmgaft.probe.wording import Wording, wordings
from pmgaft.threat import Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is probed. encode: differentiable, pixels [n, 3, H, W] -> unit features [n, D]. text: strings -> unit
    features [N, D]. name, hash: for the report.
    """

    encode: Callable[[Tensor], Tensor]
    text: Callable[[Sequence[str]], Tensor]
    logit_scale: float
    preprocess: PreprocessSpec
    name: str
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked beside the probe's settings. wordings: templates to be tried one at a time. synonyms: other names
    of the clean answer. sigma: of a certificate, None for none; draws: that count it. adversarial, difference: files
    to write.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    settings: ProbeSettings
    top_k: int = 3
    wordings: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    sigma: float | None = None
    draws: int = 1000
    adversarial: Path | None = None
    difference: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image file as the model sees it: float32 [3, H, W] in [0, 1]; and the hash of the file."""

    pixels: Tensor
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An adversarial image to be looked at: float32 [3, H, W]. probabilities: of the answer to it, over the labels.
    distance: in the threat's norm, pixel units; beyond eps where the answer did not break.
    """

    pixels: Tensor
    probabilities: list[float]
    distance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found about one picture. document: the report, for JSON. clean: its pixels, float32 [3, H, W].
    probabilities: of the answer to it, over the labels. example: the image inside the threat model if the answer broke,
    else the nearest one found outside it; None where there is none.
    """

    document: dict[str, Any]
    clean: Tensor
    probabilities: list[float]
    example: Example | None


def read_picture(image: bytes, model: Model) -> Picture:
    """Raises: ImageError for bytes that are no picture."""
    return Picture(pixels=read_pixels(image, model.preprocess), sha256=hashlib.sha256(image).hexdigest())


def examine(model: Model, pictures: Sequence[Picture], question: Question, device: torch.device) -> list[Finding]:
    """The reports on some pictures, attacked side by side; each gets what it would get alone. Times in them are of all
    together. Raises: as `probe`; OSError where a file cannot be written.
    """
    began = time.monotonic()
    pixels = torch.stack([picture.pixels for picture in pictures]).to(device)
    texts = label_features(model.text, question.labels, question.templates).to(device)
    size = len(pictures)
    reports = probe(model.encode, model.logit_scale, pixels, [texts] * size, [question.settings] * size)
    findings = []
    for picture, report, image in zip(pictures, reports, pixels, strict=True):
        parts = _Parts(model, image, texts, report, question)
        document = _document(picture, parts, began)
        before = report.probabilities_before
        findings.append(Finding(document=document, clean=image, probabilities=before, example=parts.example()))
    return findings


def _document(picture: Picture, parts: _Parts, began: float) -> dict[str, Any]:
    model, report, question = parts.model, parts.report, parts.question
    norm = question.settings.threat.norm
    document = {
        "verdict": report.verdict,
        "reason": report.reason,
        "statement": statement(report, question.labels),
        "threat_model": question.settings.to_json(),
        "model": {"name": model.name, "hash": model.hash},
        "image": {"sha256": picture.sha256, "size": list(parts.pixels.shape[1:])},
        "labels": {
            "count": len(question.labels),
            "templates": list(question.templates) if len(question.templates) <= 3 else len(question.templates),
            "sha256": _hash([question.labels, question.templates]),
        },
        "min_eps": _min_eps(report.min_eps, question.labels, norm),
        "targets": [
            {
                "label": question.labels[line.index],
                "eps": _eps(line.eps, norm),
                "eps_value": line.eps,
                "failed_eps_value": line.failed_eps,
                "first_order": _eps(line.first_order, norm),
                "gradients": line.gradients,
            }
            for line in report.targets
        ],
        "clean": _answer(report.clean_index, report.probabilities_before, report.margin_before, question),
        "adversarial": _answer(report.adversarial_index, report.probabilities_after, report.margin_after, question)
        | {"distance": eps_text(report.distance, norm), "distance_value": report.distance}
        if report.verdict == "broken"
        else None,
        "health": [
            {"name": check.name, "passed": check.passed, "said": check.said, "figures": check.figures}
            for check in report.health
        ],
        "curves": [{"loss": curve.loss, "values": curve.values} for curve in report.curves],
        "survival": parts.survival(),
        "saved": parts.save(),
        "certificate": parts.certificate(),
        "wording": parts.wording(),
        "attack_gradients": report.attack_gradients,
        "gradients": report.gradients,
        "forwards": report.forwards,
        "probe_seconds": report.seconds,
        "seconds": time.monotonic() - began,
    }
    asked = [document[name] for name in ("threat_model", "model", "image", "labels")]
    return {"id": _hash(asked)[:16], **document}


def statement(report: ProbeReport, labels: Sequence[str]) -> str:
    """The verdict in one sentence, within what it may claim."""
    threat = report.settings.threat
    clean = f"{labels[report.clean_index]!r} ({report.probabilities_before[report.clean_index]:.0%})"
    if report.verdict == "broken":
        after = f"{labels[report.adversarial_index]!r} ({report.probabilities_after[report.adversarial_index]:.0%})"
        return f"an image within {threat} turns {clean} into {after}"
    if report.verdict == "not_broken":
        aim = report.settings.target
        change = f"changes {clean}" if aim is None else f"turns {clean} into {labels[aim]!r}"
        spent = f"with {report.attack_gradients} gradients"
        return f"this attack, {spent}, found no image within {threat} that {change}; others may exist"
    return f"nothing can be said about {clean} within {threat}: {report.reason}"


class _Parts:
    """What is built on one picture's probe."""

    def __init__(self, model: Model, pixels: Tensor, texts: Tensor, report: ProbeReport, question: Question) -> None:
        self.model, self.pixels, self.texts, self.report, self.question = model, pixels, texts, report, question
        self.leads = leads_of(question.settings.groups, len(question.labels))

    def logits(self, pixels: Tensor) -> Tensor:
        return self.model.logit_scale * self.model.encode(pixels) @ self.texts.T

    def flips(self, logits: Tensor) -> bool:
        """Whether logits [K] give the answer that the attack wanted."""
        index, target = self.leads[int(logits.argmax())], self.question.settings.target
        return index != self.leads[self.report.clean_index] if target is None else index == self.leads[target]

    def example(self) -> Example | None:
        report = self.report
        if report.adversarial_pixels is not None:
            return Example(
                pixels=report.adversarial_pixels,
                probabilities=report.probabilities_after,
                distance=report.distance,
            )
        found = report.min_eps
        if found is None or found.pixels is None or found.eps is None:
            return None
        with torch.no_grad():
            probabilities = self.logits(found.pixels[None])[0].softmax(dim=0).tolist()
        return Example(pixels=found.pixels, probabilities=probabilities, distance=found.eps)

    def survival(self) -> list[dict[str, Any]]:
        found = self.report.adversarial_pixels
        if found is None:
            return []
        return [
            {
                "treatment": one.name,
                "flips": one.flips,
                "label": self.question.labels[one.index],
                "linf_distance": eps_text(one.distance),
            }
            for one in survivals(self.logits, self.flips, self.pixels, found)
        ]

    def save(self) -> dict[str, Any] | None:
        question, found = self.question, self.report.adversarial_pixels
        if question.adversarial is None and question.difference is None:
            return None
        if found is None:
            return {"note": "nothing was saved: there is no adversarial image within the threat model"}
        saved: dict[str, Any] = {}
        if question.adversarial is not None:
            best, _ = surviving_pixels(self.logits, self.flips, self.pixels, found, question.settings.threat)
            buffer = io.BytesIO()
            picture_of(best).save(buffer, "PNG")
            question.adversarial.write_bytes(buffer.getvalue())
            again = read_pixels(buffer.getvalue(), self.model.preprocess).to(self.pixels.device)
            with torch.no_grad():
                logits = self.logits(again[None])[0]
            flips = self.flips(logits)
            saved["adversarial"] = {
                "file": str(question.adversarial),
                "flips_when_read_again": flips,
                "label": question.labels[int(logits.argmax())],
                "linf_distance": eps_text(float((again - self.pixels).abs().max())),
                "note": None if flips else "rounding to 8 bits saved the answer: the file is not adversarial any more",
            }
        if question.difference is not None:
            picture, factor = difference_picture(self.pixels, found)
            picture.save(question.difference, "PNG")
            saved["difference"] = {"file": str(question.difference), "amplified": round(factor, 1)}
        return saved

    def certificate(self) -> dict[str, Any] | None:
        question = self.question
        if question.sigma is None:
            return None
        noisy = noisy_features(
            self.model.encode,
            self.pixels,
            sigma=question.sigma,
            draws=question.draws,
            seed=question.settings.seed,
        )
        return _certificate(certify(noisy, self.texts, groups=question.settings.groups), question.labels)

    def wording(self) -> dict[str, Any] | None:
        question = self.question
        if not question.wordings and not question.synonyms:
            return None
        with torch.no_grad():
            features = self.model.encode(self.pixels[None])[0]
        found = wordings(
            self.model.text,
            features,
            question.labels,
            question.templates,
            others=question.wordings,
            synonyms=question.synonyms,
            groups=question.settings.groups,
        )

        def listed(flipped: tuple[Wording, ...]) -> list[dict[str, str]]:
            return [{"wording": one.text, "label": question.labels[one.index]} for one in flipped]

        return {
            "templates": found.templates,
            "flipped_by_template": listed(found.flipped_by_template),
            "synonyms": found.synonyms,
            "flipped_by_synonym": listed(found.flipped_by_synonym),
        }


def _certificate(found: Certificate, labels: Sequence[str]) -> dict[str, Any]:
    share = f"{found.count} of {found.draws} noisy images"
    if found.index is None:
        said = f"the smoothed classifier abstains: {share} agree, too few to be sure of a majority"
    else:
        said = (
            f"the smoothed classifier (sigma {found.sigma:g}; not the model itself) answers {labels[found.index]!r}, "
            f"and no change of l2 norm below {found.radius_l2:.3g}, or of linf below {eps_text(found.radius_linf)}, "
            f"alters that, with confidence {100 * found.confidence:.4g} %"
        )
    return {
        "of": "the smoothed classifier",
        "said": said,
        "label": None if found.index is None else labels[found.index],
        "norm": "l2",
        "radius": found.radius_l2,
        "implied_linf_radius": found.radius_linf,
        "sigma": found.sigma,
        "draws": found.draws,
        "count": found.count,
        "p_low": found.p_low,
        "confidence": found.confidence,
    }


def _min_eps(found: MinEps | None, labels: Sequence[str], norm: Norm) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "eps": _eps(found.eps, norm),
        "eps_value": found.eps,
        "label": None if found.index is None else labels[found.index],
        "failed_eps": eps_text(found.failed_eps, norm),
        "failed_eps_value": found.failed_eps,
        "resolution": found.resolution,
        "finished": found.finished,
        "first_order": _eps(found.first_order, norm),
        "first_order_value": found.first_order,
        "gradients": found.gradients,
    }


def _answer(index: int, probabilities: Sequence[float], margin: float, question: Question) -> dict[str, Any]:
    order = sorted(range(len(probabilities)), key=lambda k: -probabilities[k])[: question.top_k]
    return {
        "label": question.labels[index],
        "probability": probabilities[index],
        "margin": margin,
        "top": [{"label": question.labels[k], "probability": probabilities[k]} for k in order],
    }


def _eps(value: float | None, norm: Norm) -> str | None:
    return None if value is None else eps_text(value, norm)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def groups_of(names: Sequence[Sequence[str]], labels: Sequence[str]) -> Groups:
    """Groups of labels by name as groups of positions. Raises: LabelsError (groups_invalid) for an unknown label."""
    return tuple(tuple(position_of(name, labels, "groups") for name in group) for group in names)


def position_of(name: str, labels: Sequence[str], field: str) -> int:
    """Where a label stands. Raises: LabelsError (target_invalid, groups_invalid) where it does not."""
    if name in labels:
        return labels.index(name)
    message = f"{quote(name)} is none of the labels"
    raise LabelsError(message, field=field, code=f"{field}_invalid")
