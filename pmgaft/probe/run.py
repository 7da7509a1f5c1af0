"""A probe: does this very answer to this very image survive an attack within a stated threat model, and how nearly?

Rows of different requests, with different label lists, threats and budgets, share a batch, and each gets what it would
get alone. Letters: B images, K_b labels of image b, K the longest list, D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pmgaft.attacks import Adversarial, Expired
from pmgaft.attacks.search import check_pixels
from pmgaft.probe import health
from pmgaft.probe.attack import Batch, attack, check_settings
from pmgaft.probe.minimum import Nearest, nearest_adversarial
from pmgaft.probe.report import Check, MinEps, ProbeReport, TargetEps
from pmgaft.probe.settings import ProbeSettings
from pmgaft.probe.surface import Surface
from pmgaft.threat import ThreatModel


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
    A search for the smallest eps, and the checks' attacks, may find what the verdict's own attack did not; that counts.
    Raises: LabelsError (labels_too_few) where fewer than two answers are possible, (target_invalid, groups_invalid) for
    positions that are not in the list; ThreatError (loss_invalid) for a loss that needs more answers; InputError for
    pixels outside [0, 1].
    """
    for texts, setting in zip(text_features, settings, strict=True):
        check_settings(setting, len(texts))
    began = time.monotonic()
    with torch.inference_mode(False), torch.no_grad():
        check_pixels(pixels)
        pixels = pixels.clone()
        surface = Surface.of(
            encode, logit_scale, [texts.clone() for texts in text_features], [s.groups for s in settings]
        )
        every = torch.arange(len(pixels), device=pixels.device)
        before = surface.logits(pixels, every)
        batch = Batch(
            surface=surface,
            pixels=pixels,
            before=surface.grouped(before, every),
            settings=settings,
            expired=_deadlines(settings, began, should_stop, pixels.device),
            curves=[[] for _ in settings],
        )
        work = _Work(batch)
        after = surface.logits(work.pixels, every)
    seconds = time.monotonic() - began
    return [work.report(row, before[row], after[row], len(text_features[row]), seconds) for row in range(len(pixels))]


def _deadlines(
    settings: Sequence[ProbeSettings], began: float, should_stop: Callable[[], bool] | None, device: torch.device
) -> Expired:
    limits = torch.tensor([torch.inf if s.seconds is None else s.seconds for s in settings], device=device)

    def expired(rows: Tensor) -> Tensor:
        stop = should_stop is not None and should_stop()
        return (time.monotonic() - began >= limits[rows]) | stop

    return expired


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Searches towards one target a row: rows int64 [m], targets int64 [m]."""

    rows: Tensor
    targets: Tensor
    found: Nearest


class _Work:
    """Everything that the rows of a batch ask for, in the order that lets each use what came before.

    pixels: [B, 3, H, W], the strongest image of each row: inside its ball and adversarial where one was found.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.found: Adversarial = attack(batch)
        self.pixels = self.found.pixels
        self.broke = self.found.success.clone()
        self.gradients, self.forwards = self.found.gradients_used.clone(), self.found.forwards_used + 2
        self.min_rows, self.minimum = self._minimum()
        self.tables = self._tables()
        self.extra = self._health()

    def _minimum(self) -> tuple[Tensor, Nearest | None]:
        rows = self.batch.where([s.min_eps for s in self.batch.settings], self._sound())
        if not len(rows):
            return rows, None
        nearest = self._search(rows, self.batch.aims[rows], self.found.pixels[rows])
        self._use(rows, nearest.pixels, nearest.distance)
        return rows, nearest

    def _tables(self) -> list[_Table]:
        """One search for each of the likeliest other answers, turn by turn."""
        batch, tables = self.batch, []
        others = batch.before.scatter(1, batch.clean[:, None], -torch.inf)
        likeliest, order = others.sort(dim=1, descending=True, stable=True)
        for turn in range(max((s.targets for s in batch.settings), default=0)):
            if turn >= order.shape[1]:
                break
            rows = batch.where(
                [turn < s.targets for s in batch.settings], self._sound() & (likeliest[:, turn] > -torch.inf)
            )
            if len(rows):
                targets = order[rows, turn]
                nearest = self._search(rows, targets, None)
                untargeted = batch.aims[rows] < 0
                self._use(rows, nearest.pixels, torch.where(untargeted, nearest.distance, torch.inf))
                tables.append(_Table(rows=rows, targets=targets, found=nearest))
        return tables

    def _health(self) -> health.Extra | None:
        rows = self.batch.where([s.health for s in self.batch.settings], self._sound())
        if not len(rows):
            return None
        extra = health.look(self.batch, rows, self.found)
        self.gradients[rows] += extra.gradients
        self.forwards[rows] += extra.forwards
        self._use(rows, extra.pixels, extra.distance)
        return extra

    def _search(self, rows: Tensor, aims: Tensor, starts: Tensor | None) -> Nearest:
        chosen = [self.batch.settings[row] for row in rows.tolist()]
        nearest = nearest_adversarial(
            lambda x, places: self.batch.surface.answers(x, rows[places]),
            self.batch.pixels[rows],
            self.batch.clean[rows],
            [s.threat.norm for s in chosen],
            [s.search_gradients for s in chosen],
            [s.seed for s in chosen],
            targets=aims,
            resolutions=[s.resolution for s in chosen],
            starts=starts,
            expired=lambda places: self.batch.expired(rows[places]),
        )
        self.gradients[rows] += nearest.gradients_used
        self.forwards[rows] += nearest.forwards_used
        return nearest

    def _use(self, rows: Tensor, pixels: Tensor, distance: Tensor) -> None:
        """Where the verdict's attack found nothing, something else inside the ball counts as well."""
        eps = torch.tensor([self.batch.settings[row].threat.eps for row in rows.tolist()], device=rows.device)
        better = ~self.broke[rows] & (distance <= eps + health.ROUNDING)
        self.pixels = self.pixels.index_copy(
            0, rows, torch.where(better.reshape(-1, 1, 1, 1), pixels, self.pixels[rows])
        )
        self.broke[rows] |= better

    def _sound(self) -> Tensor:
        """Rows with finite numbers whose answer is not what the probe asks for from the start: bool [B]."""
        return self.found.finite & ~self.batch.changed(self.batch.clean)

    def report(self, row: int, before: Tensor, after: Tensor, size: int, seconds: float) -> ProbeReport:
        """The verdict on one row, from the answer to the very tensor that was found. before, after: [K]."""
        batch, settings = self.batch, self.batch.settings[row]
        place = torch.tensor([row], device=before.device)
        answers = batch.surface.grouped(torch.stack([before, after]), place.expand(2))
        clean, adversarial = (int(one.argmax()) for one in answers)
        distance = _distance(self.pixels[row] - batch.pixels[row], settings.threat)
        inside = distance <= settings.threat.eps + health.ROUNDING
        inside &= bool(((self.pixels[row] >= 0) & (self.pixels[row] <= 1)).all())
        wanted = adversarial != clean if settings.target is None else adversarial == settings.target != clean
        changed = wanted and inside and bool(after[:size].isfinite().all())
        nearest = self._min_eps(row)
        table = self._target_table(row, nearest)
        looks = self._checks(row, nearest)
        reason = None if changed else self._doubt(row, clean, looks)
        margins = [_margin(one, clean) for one in answers]
        return ProbeReport(
            verdict="broken" if changed else "not_broken" if reason is None else "inconclusive",
            reason=reason,
            settings=settings,
            clean_index=int(before.argmax()),
            adversarial_index=int(after.argmax()),
            probabilities_before=before[:size].softmax(dim=0).tolist(),
            probabilities_after=after[:size].softmax(dim=0).tolist(),
            margin_before=margins[0],
            margin_after=margins[1],
            distance=distance,
            attack_gradients=int(self.found.gradients_used[row]),
            gradients=int(self.gradients[row]),
            forwards=int(self.forwards[row]),
            seconds=seconds,
            zero_gradient_share=float(self.found.zero_gradient_share[row]),
            curves=tuple(batch.curves[row]),
            adversarial_pixels=self.pixels[row] if changed else None,
            min_eps=nearest,
            targets=table,
            health=looks,
        )

    def _doubt(self, row: int, clean: int, looks: Sequence[Check]) -> str | None:
        """Why an attack that found nothing proves nothing; None if it was a fair try."""
        found, target = self.found, self.batch.settings[row].target
        share = float(found.zero_gradient_share[row])
        if target is not None and clean == target:
            return "the answer is the target already"
        if not bool(found.finite[row]):
            return "the model's gradients are not finite numbers here"
        if bool(found.cut_short[row]):
            return "time ran out before the attack's budget did"
        if share > health.ZERO_GRADIENT_LIMIT:
            return f"{100 * share:.0f} % of the gradient is exactly zero, so the attack cannot see where to go"
        if bool(self.broke[row]):
            return "the answer changed during the attack and changed back: a tie within rounding"
        failed = [check for check in looks if check.passed is False]
        return f"the attack is not to be trusted here: {failed[0].said}" if failed else None

    def _checks(self, row: int, nearest: MinEps | None) -> tuple[Check, ...]:
        extra = self.extra
        place = None if extra is None else _place(extra.rows, row)
        if extra is None or place is None:
            return ()
        return health.checks(
            extra,
            place,
            self.batch.settings[row],
            zero_share=float(self.found.zero_gradient_share[row]),
            finite=bool(self.found.finite[row]),
            broke=bool(self.found.success[row]),
            curves=self.batch.curves[row],
            nearest=None if nearest is None else nearest.eps,
        )

    def _min_eps(self, row: int) -> MinEps | None:
        """By the search itself or, where that was luckier, by one of the table's or by the checks' attacks."""
        place = _place(self.min_rows, row)
        if self.minimum is None or place is None:
            return None
        settings, own = self.batch.settings[row], self.minimum
        ways = [(own, place)]
        if settings.target is None:
            ways += [(t.found, at) for t in self.tables if (at := _place(t.rows, row)) is not None]
        best, at = min(ways, key=lambda way: float(way[0].distance[way[1]]))
        eps = float(best.distance[at])
        pixels, failed = best.pixels[at], float(best.failed[at])
        if self.extra is not None and (look := _place(self.extra.rows, row)) is not None:
            met = float(self.extra.distance[look])
            if met < eps:
                eps, pixels, failed = met, self.extra.pixels[look], failed if failed < met else 0.0
        index = None
        if math.isfinite(eps):
            with torch.no_grad():
                index = int(self.batch.surface.logits(pixels[None], torch.tensor([row], device=pixels.device)).argmax())
        first = float(own.first_order[place])
        return MinEps(
            eps=eps if math.isfinite(eps) else None,
            failed_eps=failed,
            resolution=settings.resolution,
            index=index,
            first_order=first if math.isfinite(first) else None,
            gradients=int(own.gradients_used[place]),
            finished=failed > 0,
            pixels=pixels if math.isfinite(eps) else None,
        )

    def _target_table(self, row: int, nearest: MinEps | None) -> tuple[TargetEps, ...]:
        """Where the search for any other answer came to a target more nearly than the target's own, that counts."""
        lead = -1
        if nearest is not None and nearest.index is not None:
            leads = self.batch.surface.leads
            lead = nearest.index if leads is None else int(leads[row, nearest.index])
        lines = []
        for table in self.tables:
            at = _place(table.rows, row)
            if at is None:
                continue
            target = int(table.targets[at])
            line = TargetEps(
                index=target,
                eps=_finite(table.found.distance[at]),
                failed_eps=float(table.found.failed[at]),
                first_order=_finite(table.found.first_order[at]),
                gradients=int(table.found.gradients_used[at]),
            )
            if nearest is not None and target == lead:
                line = replace(line, eps=nearest.eps, failed_eps=nearest.failed_eps)
            lines.append(line)
        return tuple(lines)


def _place(rows: Tensor, row: int) -> int | None:
    places = (rows == row).nonzero()
    return int(places[0, 0]) if len(places) else None


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def _margin(answers: Tensor, clean: int) -> float:
    """answers: [K]; the clean answer's logit minus the largest other."""
    others = answers.clone()
    others[clean] = -torch.inf
    return float(answers[clean] - others.max())


def _distance(delta: Tensor, threat: ThreatModel) -> float:
    order = torch.inf if threat.norm == "linf" else 2
    return float(torch.linalg.vector_norm(delta.flatten(), ord=order))
