"""Self-checks of an evaluation: an attack that fails looks just like a model that resists, so each run tries to tell
them apart.

Sources: Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (1802.00420), Tramer et al. 2020 (2002.08347),
Pintor et al. 2021 (2106.09947). The limits are this project's, and stand in the figures of each check.
Letters: m images of the sample: some that are answered rightly when clean, attacked once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pmgaft.attacks import Budget
from pmgaft.evaluation.protocol import NamedAttack, Protocol
from pmgaft.evaluation.run import Attacked, LogitsOf, Outcomes, attack_rows
from pmgaft.threat import ThreatModel, format_eps

QUERIES = 200
"""Of Square, per image and ball."""

_SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0)
"""In units of the smallest eps asked for."""

_PGD_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check on one set. passed: None where it had nothing to look at. said: what was seen, in one sentence."""

    name: str
    passed: bool | None
    said: str
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For the result."""
        return {"name": self.name, "passed": self.passed, "said": self.said, "figures": self.figures}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Images of the sample that can be stacked. pixels: float32 [g, 3, H, W]; labels: int64 [g], the right answers;
    numbers: of the images in their set; place: int64 [g], the rows of these images in the set's outcomes.
    """

    logits_of: LogitsOf
    pixels: Tensor
    labels: Tensor
    numbers: Sequence[int]
    place: Tensor


def sample_size(images: int) -> int:
    """One image in sixteen, at least 16 and at most 64."""
    return min(max(images // 16, 16), 64)


def sample_rows(outcomes: Outcomes, most: int) -> Tensor:
    """Rows of images that are right when clean, spread evenly: int64 [m], m at most `most`."""
    right = outcomes.right.nonzero()[:, 0]
    if len(right) <= most:
        return right
    return right[torch.linspace(0, len(right) - 1, most).round().long()]


def checks_of_outcomes(outcomes: Outcomes, classes: int) -> list[Check]:
    """What the outcomes themselves show."""
    checks = [_commonest_answer(outcomes, classes), _finite(outcomes)]
    attacked = (outcomes.stood >= 0).flatten(1).any(dim=1)
    if not bool(attacked.any()):
        return checks
    return [*checks, _inside(outcomes), _zero_gradients(outcomes.rows(attacked & (outcomes.gradients > 0)))]


def checks_of_attacks(groups: Sequence[Group], outcomes: Outcomes, protocol: Protocol, batch_size: int) -> list[Check]:
    """What more attacks on the sample show. Needs an attack and a ball with eps above 0; no group may be empty."""
    sample = _Sample(groups, protocol, batch_size)
    first = next((a for a in protocol.attacks if a.name.startswith(("pgd", "apgd"))), _pgd("pgd-ce"))
    smallest = min(threat.eps for threat in protocol.threats if threat.eps > 0)
    largest = sample.ball(math.inf).eps
    balls = [sample.ball(smallest * factor) for factor in _SWEEP if smallest * factor < largest]
    zero = sample.attacked(NamedAttack(name=first.name, budget=Budget(steps=1)), sample.ball(0.0))
    swept = [sample.attacked(first, ball) for ball in balls]
    huge = sample.attacked(first, sample.ball(largest))
    standing = [int((~found.broke).sum()) for found in swept]
    clean_share = float(outcomes.right.double().mean())
    return [
        _eps_zero(int((zero.answer != sample.labels).sum()), len(sample)),
        _monotone([0.0, *(b.eps for b in balls), largest], [len(sample), *standing, int((~huge.broke).sum())]),
        _huge_eps(int((~huge.broke).sum()), len(sample), largest),
        _square(sample, [(protocol.threats[-1], sample.robust(outcomes)), (balls[-1], ~swept[-1].broke)]),
        _ce_margin(
            ~sample.attacked(_pgd("pgd-ce"), sample.ball(smallest)).broke,
            ~sample.attacked(_pgd("pgd-margin"), sample.ball(smallest)).broke,
            clean_share,
        ),
    ]


def served_alike(same: Tensor) -> Check:
    """Native grid: does the resize inside the attack answer as the ordinary one does? same: bool [m]."""
    other, size = int((~same).sum()), len(same)
    return Check(
        name="served_alike",
        passed=other <= max(1, size // 20),
        said=f"{other} of {size} images get another answer through the ordinary resize, which rounds to 8 bits",
        figures={"different": other, "images": size, "limit": max(1, size // 20)},
    )


class _Sample:
    """The images, and one attack after another on all or some of them; results in the order of the groups."""

    def __init__(self, groups: Sequence[Group], protocol: Protocol, batch_size: int) -> None:
        self._groups, self._protocol, self._batch_size = groups, protocol, batch_size
        self.labels = torch.cat([group.labels for group in groups])
        self._logits = [_clean_logits(group, batch_size) for group in groups]

    def __len__(self) -> int:
        return len(self.labels)

    def ball(self, eps: float) -> ThreatModel:
        """Of the protocol's norm and grid; at most so large that every image can become grey."""
        like = self._protocol.threats[-1]
        most = 0.5 if like.norm == "linf" else 0.5 * math.sqrt(max(g.pixels[0].numel() for g in self._groups))
        return ThreatModel(norm=like.norm, eps=min(eps, most), grid=like.grid)

    def robust(self, outcomes: Outcomes) -> Tensor:
        """Which of the images stood in the protocol's largest ball: bool [m]."""
        place = torch.cat([group.place for group in self._groups])
        return outcomes.robust[place, -1].to(self.labels.device)

    def attacked(self, attack: NamedAttack, ball: ThreatModel, only: Tensor | None = None) -> Attacked:
        """only: bool [m], the images to attack; None: all."""
        parts: list[Attacked] = []
        chosen = torch.ones_like(self.labels, dtype=torch.bool) if only is None else only
        sizes = [len(group.labels) for group in self._groups]
        for group, logits, wanted in zip(self._groups, self._logits, torch.split(chosen, sizes), strict=True):
            parts += [
                attack_rows(
                    group.logits_of,
                    group.pixels[rows],
                    group.labels[rows],
                    logits[rows],
                    attack,
                    ball,
                    [self._protocol.seed + group.numbers[row] for row in rows.tolist()],
                )
                for rows in torch.split(wanted.nonzero()[:, 0], self._batch_size)
                if len(rows)
            ]
        return Attacked(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Attacked)})


def _clean_logits(group: Group, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([group.logits_of(some) for some in torch.split(group.pixels, batch_size)])


def _pgd(name: str) -> NamedAttack:
    return NamedAttack(name=name, budget=Budget(steps=_PGD_STEPS))


def _commonest_answer(outcomes: Outcomes, classes: int) -> Check:
    size = len(outcomes)
    share = float(torch.bincount(outcomes.clean, minlength=classes).max()) / size
    honest = float(torch.bincount(outcomes.label, minlength=classes).max()) / size
    limit = max(0.5, honest + 0.25)
    return Check(
        name="commonest_answer",
        passed=share <= limit,
        said=f"{100 * share:.0f} % of all clean answers are the same class (the labels': {100 * honest:.0f} %); "
        "who always says the same cannot be moved",
        figures={"share": share, "labels_share": honest, "limit": limit},
    )


def _finite(outcomes: Outcomes) -> Check:
    bad = int((~outcomes.finite).sum())
    return Check(
        name="finite",
        passed=bad == 0,
        said=f"{bad} images met logits or gradients that are no finite numbers",
        figures={"images": bad, "limit": 0},
    )


def _inside(outcomes: Outcomes) -> Check:
    bad = int((~outcomes.inside).sum())
    return Check(
        name="inside",
        passed=bad == 0,
        said=f"for {bad} images an attack left its ball or the pixel range; those points were not counted",
        figures={"images": bad, "limit": 0},
    )


def _zero_gradients(attacked: Outcomes) -> Check:
    if not len(attacked):
        return Check(name="zero_gradients", passed=None, said="no attack used gradients", figures={})
    share, blind = float(attacked.zero_gradient_share.mean()), int((attacked.zero_gradient_share > 0.999).sum())
    return Check(
        name="zero_gradients",
        passed=share <= 0.01 and blind == 0,
        said=f"{100 * share:.2f} % of the gradients' entries were exactly zero, everything for {blind} of "
        f"{len(attacked)} images",
        figures={"share": share, "limit": 0.01, "blind_images": blind},
    )


def _eps_zero(different: int, size: int) -> Check:
    return Check(
        name="eps_zero",
        passed=different == 0,
        said=f"attacked with eps 0, {different} of {size} images get another answer than clean",
        figures={"different": different, "images": size, "limit": 0},
    )


def _monotone(radii: Sequence[float], standing: Sequence[int]) -> Check:
    """A rise of one image, or of one standard deviation of a count, is chance."""
    size = standing[0]
    rises = [
        after - before > max(1.0, math.sqrt(size * (p := before / size) * (1 - p)))
        for before, after in itertools.pairwise(standing)
    ]
    course = ", ".join(f"{_eps_text(eps)}: {count}" for eps, count in zip(radii, standing, strict=True))
    return Check(
        name="monotone",
        passed=not any(rises),
        said=f"of {size} images, attacked anew in each ball, stand at eps {course}",
        figures={"eps": list(radii), "standing": list(standing), "images": size},
    )


def _huge_eps(standing: int, size: int, eps: float) -> Check:
    limit = max(1, size // 20)
    return Check(
        name="huge_eps",
        passed=standing <= limit,
        said=f"{standing} of {size} images stand at eps {eps:g}, where every image can be made plain grey",
        figures={"standing": standing, "images": size, "eps": eps, "limit": limit},
    )


def _square(sample: _Sample, survivors: Sequence[tuple[ThreatModel, Tensor]]) -> Check:
    """Square on what the gradient attacks left, in each of the balls: more than one image and 0.2 % is no chance."""
    square = NamedAttack(name="square", budget=Budget(steps=QUERIES))
    tried = {ball.eps: (ball, left) for ball, left in survivors if bool(left.any())}
    if not tried:
        said = f"the gradient attacks left nothing of {len(sample)} images for Square"
        return Check(name="square", passed=True, said=said, figures={"broke": {}, "images": len(sample)})
    broke = {_eps_text(eps): int(sample.attacked(square, *one).broke.sum()) for eps, one in tried.items()}
    left = {_eps_text(eps): int(standing.sum()) for eps, (_, standing) in tried.items()}
    most = max(1, math.floor(0.002 * len(sample)))
    course = ", ".join(f"{count} of {left[eps]} at {eps}" for eps, count in broke.items())
    return Check(
        name="square",
        passed=max(broke.values()) <= most,
        said=f"Square with {QUERIES} queries and no gradient broke {course} that the gradient attacks had left",
        figures={"broke": broke, "left": left, "images": len(sample), "limit": most, "queries": QUERIES},
    )


def _ce_margin(ce: Tensor, margin: Tensor, clean_share: float) -> Check:
    """ce, margin: bool [m], standing after PGD on either loss. Two points of robust accuracy apart, beyond the
    standard deviation of a difference of paired counts, is no chance.
    """
    size = len(ce)
    points = 100 * clean_share / size
    gap = points * (int(ce.sum()) - int(margin.sum()))
    limit = 2 + points * math.sqrt(int((ce != margin).sum()))
    return Check(
        name="ce_margin",
        passed=gap <= limit,
        said=f"of {size} images {int(ce.sum())} stand after PGD on the cross entropy and {int(margin.sum())} after "
        f"PGD on the margin, {gap:.1f} points of robust accuracy apart",
        figures={"ce": int(ce.sum()), "margin": int(margin.sum()), "gap_points": gap, "limit": limit},
    )


def _eps_text(eps: float) -> str:
    return format_eps(eps) if eps <= 0.25 else f"{eps:g}"
