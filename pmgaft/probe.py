"""A probe: does this very answer to this very image survive an attack within a stated threat model?

Pure, and light enough for a serving worker: torch and nothing else. Rows of different requests, with different label
lists, threats and budgets, share a batch, and each gets what it would get alone.
Letters: B images, K_b labels of image b, K the longest list, D features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pmgaft.attacks import Adversarial, Budget, Loss, cross_entropy_loss, margin_loss, merged, misclassified, pgd
from pmgaft.errors import LabelsError
from pmgaft.threat import ThreatModel

Verdict = Literal["broken", "not_broken", "inconclusive"]

ZERO_GRADIENT_LIMIT = 0.01
"""Mean share of exactly zero gradient entries above which an attack that found nothing proves nothing."""

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """The threat model of one probe, and what may be spent on it.

    steps and restarts are per loss: the cross entropy is climbed first, then the margin to the nearest rival, each with
    at most steps x restarts gradients. step_size: pixel units; None is 2.5 eps / steps. seconds: of wall time, None for
    no limit. Raises: ThreatError for a budget that makes no sense.
    """

    threat: ThreatModel
    steps: int = 20
    restarts: int = 1
    step_size: float | None = None
    seed: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no attack could mean."""
        self.budget()

    def budget(self) -> Budget:
        """As the attack takes it."""
        return Budget(steps=self.steps, step_size=self.step_size, restarts=self.restarts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What a probe found.

    verdict: "broken": an adversarial image inside the threat model was found, and the model's own answer to it is
    another. "not_broken": this attack, with this budget, found none. "inconclusive": see reason.
    clean_index, adversarial_index: positions in the image's label list of the model's answers to the image and to the
    strongest image found. probabilities_before, probabilities_after: over that list, to the same two images.
    distance: of the strongest image from the original, in the threat's norm, pixel units. gradients, forwards: spent.
    zero_gradient_share: in [0, 1], of the attack's gradient entries. adversarial_pixels: float32 [3, H, W], if broken.
    """

    verdict: Verdict
    reason: str | None
    settings: ProbeSettings
    clean_index: int
    adversarial_index: int
    probabilities_before: list[float]
    probabilities_after: list[float]
    distance: float
    gradients: int
    forwards: int
    seconds: float
    zero_gradient_share: float
    adversarial_pixels: Tensor | None


def probe(
    encode: Callable[[Tensor], Tensor],
    logit_scale: float,
    pixels: Tensor,
    text_features: Sequence[Tensor],
    settings: Sequence[ProbeSettings],
    should_stop: Callable[[], bool] | None = None,
) -> list[ProbeReport]:
    """Attack the model's own answer to each image.

    encode: differentiable, pixels float32 [n, 3, H, W] -> unit features [n, D]. pixels: float32 [B, 3, H, W] in [0, 1],
    model-input grid. text_features: for each image the unit features [K_b, D] of its labels. settings: one per image.
    should_stop: asked before every step; once true, rows that are not settled end as inconclusive.
    Raises: LabelsError (labels_too_few) for a list of fewer than two labels; InputError for pixels outside [0, 1].
    """
    for labels in text_features:
        if len(labels) < 2:
            raise LabelsError("a probe needs at least two labels", field="labels", code="labels_too_few")
    began = time.monotonic()
    with torch.inference_mode(False), torch.no_grad():
        logits_of = _masked_logits(encode, logit_scale, [texts.clone() for texts in text_features])
        every = torch.arange(len(pixels), device=pixels.device)
        before = logits_of(pixels, every)
        found = _search(logits_of, pixels, before, settings, _deadlines(settings, began, should_stop, pixels.device))
        after = logits_of(found.pixels, every)
    seconds = time.monotonic() - began
    sizes = [len(texts) for texts in text_features]
    return [
        _report(row, found, pixels[row], before[row, :size], after[row, :size], setting, seconds)
        for row, (size, setting) in enumerate(zip(sizes, settings, strict=True))
    ]


LogitsOf = Callable[[Tensor, Tensor], Tensor]
Expired = Callable[[Tensor], Tensor]


def _masked_logits(encode: Callable[[Tensor], Tensor], scale: float, text_features: Sequence[Tensor]) -> LogitsOf:
    """(pixels, rows [n]) -> logits [n, K]; -inf where a row's list is shorter than the longest."""
    texts = torch.nn.utils.rnn.pad_sequence(list(text_features), batch_first=True)
    sizes = torch.tensor([len(t) for t in text_features], device=texts.device)
    absent = torch.arange(texts.shape[1], device=texts.device) >= sizes[:, None]

    def logits_of(pixels: Tensor, rows: Tensor) -> Tensor:
        logits = scale * torch.einsum("nd,nkd->nk", encode(pixels), texts[rows])
        return logits.masked_fill(absent[rows], -torch.inf)

    return logits_of


def _deadlines(
    settings: Sequence[ProbeSettings], began: float, should_stop: Callable[[], bool] | None, device: torch.device
) -> Expired:
    limits = torch.tensor([torch.inf if s.seconds is None else s.seconds for s in settings], device=device)

    def expired(rows: Tensor) -> Tensor:
        stop = should_stop is not None and should_stop()
        return (time.monotonic() - began >= limits[rows]) | stop

    return expired


def _search(
    logits_of: LogitsOf, pixels: Tensor, before: Tensor, settings: Sequence[ProbeSettings], expired: Expired
) -> Adversarial:
    """Climb the cross entropy; where that finds nothing, the margin. For two labels they are the same loss."""
    every = torch.arange(len(pixels), device=pixels.device)
    clean = before.argmax(dim=1)
    found = _attack(logits_of, pixels, clean, settings, expired, cross_entropy_loss, every)
    several = before.isfinite().sum(dim=1) > 2
    rows = every[~found.success & found.finite & ~found.cut_short & several]
    if not len(rows):
        return found
    margin = _attack(logits_of, pixels, clean, settings, expired, margin_loss, rows)
    return merged(found, margin, rows, torch.ones_like(rows, dtype=torch.bool))


def _attack(
    logits_of: LogitsOf,
    pixels: Tensor,
    clean: Tensor,
    settings: Sequence[ProbeSettings],
    expired: Expired,
    loss: Callable[[Tensor], Loss],
    rows: Tensor,
) -> Adversarial:
    """PGD on some rows of the batch, int64 [m]; the result has m rows."""
    chosen = [settings[row] for row in rows.tolist()]
    return pgd(
        lambda x, places: logits_of(x, rows[places]),
        pixels[rows],
        loss(clean[rows]),
        threats=[s.threat for s in chosen],
        budgets=[s.budget() for s in chosen],
        seeds=[s.seed for s in chosen],
        success=misclassified(clean[rows]),
        expired=lambda places: expired(rows[places]),
    )


def _report(
    row: int,
    found: Adversarial,
    pixels: Tensor,
    before: Tensor,
    after: Tensor,
    settings: ProbeSettings,
    seconds: float,
) -> ProbeReport:
    """The verdict on one row, from the answer to the very tensor that the attack returned."""
    adversarial = found.pixels[row]
    clean_index, adversarial_index = int(before.argmax()), int(after.argmax())
    distance = _distance(adversarial - pixels, settings.threat)
    inside = distance <= settings.threat.eps + _ROUNDING and bool(((adversarial >= 0) & (adversarial <= 1)).all())
    changed = adversarial_index != clean_index and inside and bool(after.isfinite().all())
    reason = None if changed else _doubt(row, found)
    return ProbeReport(
        verdict="broken" if changed else "not_broken" if reason is None else "inconclusive",
        reason=reason,
        settings=settings,
        clean_index=clean_index,
        adversarial_index=adversarial_index,
        probabilities_before=before.softmax(dim=0).tolist(),
        probabilities_after=after.softmax(dim=0).tolist(),
        distance=distance,
        gradients=int(found.gradients_used[row]),
        forwards=int(found.forwards_used[row]) + 2,
        seconds=seconds,
        zero_gradient_share=float(found.zero_gradient_share[row]),
        adversarial_pixels=adversarial if changed else None,
    )


def _doubt(row: int, found: Adversarial) -> str | None:
    """Why an attack that found nothing proves nothing; None if it was a fair try."""
    share = float(found.zero_gradient_share[row])
    if not bool(found.finite[row]):
        return "the model's gradients are not finite numbers here"
    if bool(found.cut_short[row]):
        return "time ran out before the attack's budget did"
    if share > ZERO_GRADIENT_LIMIT:
        return f"{100 * share:.0f} % of the gradient is exactly zero, so the attack cannot see where to go"
    if bool(found.success[row]):
        return "the answer changed during the attack and changed back: a tie within rounding"
    return None


def _distance(delta: Tensor, threat: ThreatModel) -> float:
    order = torch.inf if threat.norm == "linf" else 2
    return float(torch.linalg.vector_norm(delta.flatten(), ord=order))
