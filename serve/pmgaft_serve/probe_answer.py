"""What a probe found, in the words of the interface, and no more than was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pmgaft.probe import Certificate, ProbeReport, Survival, Wordings, eps_text
from pmgaft.probe.surface import leads_of
from pmgaft.probe.wording import Wording

from . import protocol
from .probe_protocol import (
    Adversarial,
    AdversarialImage,
    CertificateAnswer,
    HealthCheck,
    OtherWording,
    ProbeAnswer,
    ProbeThreat,
    SmallestEps,
    TargetEps,
    Treatment,
    WordingAnswer,
    labels_hash,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Png:
    """An adversarial image as a file. label: the served engine's answer to this file; distance: linf, pixel units."""

    base64: str
    label: str
    distance: float


@dataclass(slots=True)
class Parts:
    """What was asked for beside the attack. None: it was not, or there was no time (`unfinished`), or nothing to it."""

    survival: Sequence[Survival] | None = None
    wording: Wordings | None = None
    certificate: Certificate | None = None
    png: Png | None = None
    unfinished: list[str] = field(default_factory=list)


def wanted(report: ProbeReport, index: int) -> bool:
    """Whether the label at this position is an answer that the probe was after. Labels of one group are one answer."""
    leads = leads_of(report.settings.groups, len(report.probabilities_before))
    target = report.settings.target
    return leads[index] != leads[report.clean_index] if target is None else leads[index] == leads[target]


def same_answer(report: ProbeReport, index: int) -> bool:
    """Whether the label at this position is the attacked encoder's own answer to the image."""
    leads = leads_of(report.settings.groups, len(report.probabilities_before))
    return leads[index] == leads[report.clean_index]


def probe_answer(
    report: ProbeReport,
    labels: Sequence[str],
    templates: Sequence[str],
    bundle: str,
    *,
    clean: protocol.Prediction,
    served: protocol.Prediction | None,
    smallest: protocol.Prediction | None,
    parts: Parts,
) -> ProbeAnswer:
    """A probe's report in the words of the interface.

    clean: the served engine's answer to the image itself; served: its answer to the adversarial image, smallest: to the
    one at the smallest eps, where there are such. The attack ran on the differentiable encoder. Where the served engine
    is not fooled by what fooled that one, or they differ about the image itself, nothing is claimed: the verdict is
    inconclusive, and `reason` says so.
    """
    verdict, reason = report.verdict, report.reason
    if not same_answer(report, labels.index(clean.label)):
        verdict = "inconclusive"
        reason = f"the attacked encoder answers {labels[report.clean_index]!r} to the image itself"
    elif served is not None and not wanted(report, labels.index(served.label)):
        verdict = "inconclusive"
        reason = "the adversarial image fools the attacked encoder and not the engine that serves"
    settings = report.settings
    return ProbeAnswer(
        verdict=verdict,
        reason=reason,
        statement=_statement(verdict, reason, report, labels, clean, served),
        threat_model=_threat(report, labels, templates, bundle),
        clean=Adversarial(label=clean.label, probability=clean.probability),
        adversarial=None if served is None else Adversarial(label=served.label, probability=served.probability),
        distance=None if served is None else eps_text(report.distance, settings.threat.norm),
        min_eps=_smallest_eps(report, labels, smallest),
        targets=_targets(report, labels) if settings.targets else None,
        health=[HealthCheck(name=one.name, passed=one.passed, said=one.said) for one in report.health] or None,
        survival=None if parts.survival is None else [_treatment(one, labels) for one in parts.survival],
        wording=None if parts.wording is None else _wording(parts.wording, labels),
        certificate=None if parts.certificate is None else _certificate(parts.certificate, labels),
        image=None if parts.png is None else _image(parts.png, report, labels),
        unfinished=parts.unfinished or None,
        attack_gradients=report.attack_gradients,
        gradients=report.gradients,
        forwards=report.forwards,
        zero_gradient_share=round(report.zero_gradient_share, 6),
        seconds=round(report.seconds, 3),
    )


def _threat(report: ProbeReport, labels: Sequence[str], templates: Sequence[str], bundle: str) -> ProbeThreat:
    settings = report.settings
    said: dict[str, Any] = settings.to_json() | {
        "target": None if settings.target is None else labels[settings.target],
        "groups": [[labels[place] for place in group] for group in settings.groups],
        "bundle": bundle,
        "labels": len(labels),
        "templates": len(templates),
        "labels_sha256": labels_hash(labels, templates),
    }
    return ProbeThreat(**said)


def _smallest_eps(report: ProbeReport, labels: Sequence[str], served: protocol.Prediction | None) -> SmallestEps | None:
    found, norm = report.min_eps, report.settings.threat.norm
    if found is None:
        return None
    return SmallestEps(
        eps=None if found.eps is None else eps_text(found.eps, norm),
        eps_value=found.eps,
        label=None if found.index is None else labels[found.index],
        confirmed=None if served is None else wanted(report, labels.index(served.label)),
        failed_eps=eps_text(found.failed_eps, norm),
        first_order=None if found.first_order is None else eps_text(found.first_order, norm),
        resolution=found.resolution,
        finished=found.finished,
        gradients=found.gradients,
    )


def _targets(report: ProbeReport, labels: Sequence[str]) -> list[TargetEps]:
    norm = report.settings.threat.norm
    return [
        TargetEps(
            label=labels[line.index],
            eps=None if line.eps is None else eps_text(line.eps, norm),
            eps_value=line.eps,
            first_order=None if line.first_order is None else eps_text(line.first_order, norm),
            gradients=line.gradients,
        )
        for line in report.targets
    ]


def _treatment(one: Survival, labels: Sequence[str]) -> Treatment:
    return Treatment(treatment=one.name, flips=one.flips, label=labels[one.index], linf_distance=eps_text(one.distance))


def _wording(found: Wordings, labels: Sequence[str]) -> WordingAnswer:
    def listed(flipped: Sequence[Wording]) -> list[OtherWording]:
        return [OtherWording(wording=one.text, label=labels[one.index]) for one in flipped]

    return WordingAnswer(
        templates=found.templates,
        flipped_by_template=listed(found.flipped_by_template),
        synonyms=found.synonyms,
        flipped_by_synonym=listed(found.flipped_by_synonym),
    )


def _certificate(found: Certificate, labels: Sequence[str]) -> CertificateAnswer:
    counted = f"{found.count} of {found.draws} noisy images"
    if found.index is None:
        said = f"the smoothed classifier abstains: {counted} agree, too few to be sure of a majority"
    else:
        said = (
            f"the smoothed classifier (sigma {found.sigma:g}; not the model itself) answers {labels[found.index]!r}, "
            f"and no change of l2 norm below {found.radius_l2:.3g} alters that, with confidence {found.confidence:.1%}"
        )
    return CertificateAnswer(
        label=None if found.index is None else labels[found.index],
        radius_l2=found.radius_l2,
        implied_linf_radius=found.radius_linf,
        sigma=found.sigma,
        draws=found.draws,
        count=found.count,
        p_low=found.p_low,
        confidence=found.confidence,
        statement=said,
    )


def _image(png: Png, report: ProbeReport, labels: Sequence[str]) -> AdversarialImage:
    flips = wanted(report, labels.index(png.label))
    return AdversarialImage(
        png_base64=png.base64,
        flips=flips,
        label=png.label,
        linf_distance=eps_text(png.distance),
        note="this very file, read again, still changes the answer"
        if flips
        else "rounding to 8 bits saved the answer: this file is not adversarial any more",
    )


def _statement(
    verdict: str,
    reason: str | None,
    report: ProbeReport,
    labels: Sequence[str],
    clean: protocol.Prediction,
    served: protocol.Prediction | None,
) -> str:
    threat, target = report.settings.threat, report.settings.target
    if verdict == "broken" and served is not None:
        return f"an image within {threat} changes this answer from {clean.label!r} to {served.label!r}"
    if verdict == "not_broken":
        change = f"changes the answer {clean.label!r}"
        if target is not None:
            change = f"turns the answer {clean.label!r} into {labels[target]!r}"
        tried = f"this attack, with {report.attack_gradients} gradients,"
        return f"{tried} found no image within {threat} that {change}; others may exist"
    return f"nothing can be said about images within {threat}: {reason}"
