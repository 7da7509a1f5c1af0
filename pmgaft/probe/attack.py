"""The attack behind a verdict, on a batch of rows that share nothing but the encoder.

Letters: B rows of the batch, m of them attacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pmgaft.attacks import (
    Adversarial,
    Budget,
    Expired,
    Loss,
    Success,
    apgd,
    cross_entropy_loss,
    dlr_loss,
    margin_loss,
    merged,
    misclassified,
    pgd,
    reaches,
    square,
    targeted_cross_entropy_loss,
    targeted_dlr_loss,
    targeted_margin_loss,
)
from pmgaft.errors import LabelsError, ThreatError
from pmgaft.probe.report import Curve
from pmgaft.probe.settings import Algorithm, LossName, ProbeSettings
from pmgaft.probe.surface import Surface
from pmgaft.threat import ThreatModel

_SEARCHES = {"pgd": pgd, "apgd": apgd, "square": square}
_LEAST_ANSWERS: dict[tuple[LossName, bool], int] = {("dlr", False): 3, ("dlr", True): 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images, what is asked of each, and the model's answers to them.

    pixels: float32 [B, 3, H, W]. before: logits of the answers to them, [B, K]. settings: one a row. expired: which
    rows are out of time. curves: filled in by the attacks.
    """

    surface: Surface
    pixels: Tensor
    before: Tensor
    settings: Sequence[ProbeSettings]
    expired: Expired
    curves: list[list[Curve]] = field(default_factory=list)

    @property
    def clean(self) -> Tensor:
        """The answers, int64 [B]."""
        return self.before.argmax(dim=1)

    @property
    def every(self) -> Tensor:
        """All rows: int64 [B]."""
        return torch.arange(len(self.pixels), device=self.pixels.device)

    @property
    def aims(self) -> Tensor:
        """The answer that each row must become, -1 for any other: int64 [B]."""
        aims = [-1 if s.target is None else s.target for s in self.settings]
        return torch.tensor(aims, dtype=torch.int64, device=self.pixels.device)

    def where(self, chosen: Sequence[bool], among: Tensor | None = None) -> Tensor:
        """Rows that are chosen, and among those given as bool [B]: int64 [m]."""
        mask = torch.tensor(list(chosen), dtype=torch.bool, device=self.pixels.device)
        return (mask if among is None else mask & among).nonzero()[:, 0]

    def changed(self, answers: Tensor) -> Tensor:
        """Whether answers, int64 [B], are what each row's probe asks for: bool [B]."""
        return torch.where(self.aims < 0, answers != self.clean, answers == self.aims)


def check_settings(settings: ProbeSettings, labels: int) -> None:
    """What only shows beside the label list. Raises: LabelsError (labels_too_few, target_invalid, groups_invalid);
    ThreatError (loss_invalid) for a loss that needs more answers than there are.
    """
    inside = [position for group in settings.groups for position in group]
    if inside and max(inside) >= labels:
        raise LabelsError(f"a group names label {max(inside)} of {labels}", field="groups", code="groups_invalid")
    answers = labels - sum(len(group) - 1 for group in settings.groups if group)
    if answers < 2:
        grouped = " that do not all count as one" if inside else ""
        raise LabelsError(f"a probe needs at least two labels{grouped}", field="labels", code="labels_too_few")
    if settings.target is not None and not 0 <= settings.target < labels:
        message = f"the target must be a position from 0 to {labels - 1}, not {settings.target}"
        raise LabelsError(message, field="target", code="target_invalid")
    for loss in settings.losses:
        least = _LEAST_ANSWERS.get((loss, settings.target is not None), 2)
        if answers < least:
            kind = "a targeted" if settings.target is not None else "an untargeted"
            message = f"the loss {loss} of {kind} probe needs {least} answers, not {answers}; ce and margin do not"
            raise ThreatError(message, field="losses", code="loss_invalid")


def attack(batch: Batch) -> Adversarial:
    """Each row's losses in its order, until its answer has changed or the budget is spent."""
    found = _untouched(batch.pixels)
    answers = batch.before.isfinite().sum(dim=1)
    for turn in range(max((len(s.losses) for s in batch.settings), default=0)):
        still = ~found.success & found.finite & ~found.cut_short
        still &= (answers > 2) if turn else torch.ones_like(still)
        for loss, algorithm in _kinds(batch.settings, turn):
            rows = batch.where([_kind(s, turn) == (loss, algorithm) for s in batch.settings], still)
            if len(rows):
                another = climb(batch, rows, loss, algorithm)
                found = merged(found, another, rows, torch.ones_like(rows, dtype=torch.bool))
    return found


def climb(
    batch: Batch,
    rows: Tensor,
    loss: LossName,
    algorithm: str,
    *,
    eps: Sequence[float] | None = None,
    budgets: Sequence[Budget] | None = None,
    record: bool = True,
) -> Adversarial:
    """One attack on some rows, int64 [m]; the result has m rows. eps, budgets: one per such row, else the settings'."""
    chosen = [batch.settings[row] for row in rows.tolist()]
    threats = [s.threat for s in chosen]
    if eps is not None:
        threats = [ThreatModel(norm=t.norm, eps=e, grid=t.grid) for t, e in zip(threats, eps, strict=True)]
    labels, aims = batch.clean[rows], batch.aims[rows]
    climbed = _loss(loss, labels, aims)
    values: list[tuple[Tensor, Tensor]] = []

    def recorded(logits: Tensor, places: Tensor) -> Tensor:
        losses = climbed(logits, places)
        values.append((places, losses.detach()))
        return losses

    found: Adversarial = _SEARCHES[algorithm](
        lambda x, places: batch.surface.answers(x, rows[places]),
        batch.pixels[rows],
        recorded,
        threats=threats,
        budgets=[s.budget() for s in chosen] if budgets is None else budgets,
        seeds=[s.seed for s in chosen],
        success=_success(labels, aims),
        expired=lambda places: batch.expired(rows[places]),
    )
    if record:
        _record(batch, rows, loss, values)
    return found


def _record(batch: Batch, rows: Tensor, loss: LossName, values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write down each row's losses in the order they were met."""
    curves: list[list[float]] = [[] for _ in range(len(rows))]
    for places, losses in values:
        for place, value in zip(places.tolist(), losses.tolist(), strict=True):
            curves[place].append(value)
    for row, curve in zip(rows.tolist(), curves, strict=True):
        batch.curves[row].append(Curve(loss=loss, values=curve))


def _loss(name: LossName, labels: Tensor, aims: Tensor) -> Loss:
    """For rows with and without a target. labels, aims: int64 [m], an aim of -1 being none."""
    away = {"ce": cross_entropy_loss, "margin": margin_loss, "dlr": dlr_loss}[name](labels)
    if not bool((aims >= 0).any()):
        return away
    targets = torch.where(aims < 0, labels, aims)
    towards = {
        "ce": lambda: targeted_cross_entropy_loss(targets),
        "margin": lambda: targeted_margin_loss(labels, targets),
        "dlr": lambda: targeted_dlr_loss(labels, targets),
    }[name]()

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return torch.where(aims[rows] < 0, away(logits, rows), towards(logits, rows))

    return loss


def _success(labels: Tensor, aims: Tensor) -> Success:
    away, towards = misclassified(labels), reaches(aims)

    def success(logits: Tensor, rows: Tensor) -> Tensor:
        return torch.where(aims[rows] < 0, away(logits, rows), towards(logits, rows))

    return success


def _kind(settings: ProbeSettings, turn: int) -> tuple[LossName, Algorithm] | None:
    return (settings.losses[turn], settings.used_algorithm) if turn < len(settings.losses) else None


def _kinds(settings: Sequence[ProbeSettings], turn: int) -> list[tuple[LossName, Algorithm]]:
    """What the rows want in this turn, in a fixed order."""
    return sorted({kind for s in settings if (kind := _kind(s, turn)) is not None})


def _untouched(pixels: Tensor) -> Adversarial:
    size, device = len(pixels), pixels.device
    no = torch.zeros(size, dtype=torch.bool, device=device)
    none = torch.zeros(size, dtype=torch.int64, device=device)
    return Adversarial(
        pixels=pixels.detach().float().clone(),
        success=no,
        loss=torch.full((size,), -torch.inf, device=device),
        finite=~no,
        cut_short=no,
        gradients_used=none,
        forwards_used=none,
        zero_gradient_share=torch.zeros(size, device=device),
    )
