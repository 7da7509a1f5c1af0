"""Is the attack itself to be trusted? An attack that fails looks just like an answer that holds.

Sources: Carlini et al. 2019 (arXiv 1902.06705), Athalye et al. 2018 (1802.00420), Tramer et al. 2020 (2002.08347).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmgaft.attacks import Adversarial, Budget
from pmgaft.probe.attack import Batch, climb
from pmgaft.probe.report import Check, Curve
from pmgaft.probe.settings import ProbeSettings, eps_text
from pmgaft.threat import Norm, ThreatModel

ZERO_GRADIENT_LIMIT = 0.01
"""Mean share of exactly zero gradient entries above which an attack that found nothing proves nothing."""

SWEEP = (0.5, 2.0, 4.0)
"""Times the probe's eps: other balls that are tried."""

SWEEP_STEPS = 10
SLACK = 1.25
"""An attack may miss what a ball narrower by no more than this factor holds: attacks are not perfect."""

ROUNDING = 1e-6
"""Pixel units by which float32 may put a point outside its ball."""

_SAME = 1e-3
"""Of logits that should be equal: differences of float rounding lie below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """What the checks' own attacks met on m rows.

    rows: int64 [m]. zero: [m], largest change of a logit in a ball of radius 0. tried: eps tried, a list a row; broke:
    whether each changed the answer. square: bool [m], whether the attack without gradients did; None where it was not
    asked. pixels, distance: the nearest image that any of them found, and how far it is in the row's norm, [m]; inf
    where none was. gradients, forwards: int64 [m].
    """

    rows: Tensor
    zero: Tensor
    tried: list[list[float]]
    broke: list[list[bool]]
    square: list[bool | None]
    pixels: Tensor
    distance: Tensor
    gradients: Tensor
    forwards: Tensor


def look(batch: Batch, rows: Tensor, found: Adversarial) -> Extra:
    """Attack some rows, int64 [m], in other balls; and, where their answers still stand, without gradients."""
    chosen = [batch.settings[row] for row in rows.tolist()]
    few = [Budget(steps=SWEEP_STEPS, restarts=1) for _ in chosen]
    zero = climb(
        batch, rows, "ce", "pgd", eps=[0.0] * len(chosen), budgets=[Budget(steps=1)] * len(chosen), record=False
    )
    with torch.no_grad():
        change = (batch.surface.answers(zero.pixels, rows) - batch.before[rows]).nan_to_num(nan=0.0, neginf=0.0)
    gradients, forwards = zero.gradients_used.clone(), zero.forwards_used + 1
    nearest = _Nearest(batch.pixels[rows], [s.threat.norm == "l2" for s in chosen])
    balls = [_balls(s.threat, batch.pixels[0].numel()) for s in chosen]
    outcomes: list[Tensor] = []
    for turn in range(len(SWEEP) + 1):
        eps = [ball[turn] for ball in balls]
        tried = climb(batch, rows, "ce", "pgd", eps=eps, budgets=few, record=False)
        outcomes.append(tried.success)
        nearest.take(tried, slice(None))
        gradients, forwards = gradients + tried.gradients_used, forwards + tried.forwards_used
    fell: list[bool | None] = [None] * len(chosen)
    asked = torch.tensor([s.square_queries > 0 for s in chosen], device=rows.device)
    own = torch.tensor([s.threat.eps for s in chosen], device=rows.device)
    standing = (asked & ~found.success[rows] & (nearest.distance > own + ROUNDING)).nonzero()[:, 0]
    if len(standing):
        queries = [Budget(steps=chosen[place].square_queries) for place in standing.tolist()]
        blind = climb(batch, rows[standing], "margin", "square", budgets=queries, record=False)
        nearest.take(blind, standing)
        forwards[standing] += blind.forwards_used
        for place, broke in zip(standing.tolist(), blind.success.tolist(), strict=True):
            fell[place] = broke
    return Extra(
        rows=rows,
        zero=change.abs().amax(dim=1),
        tried=balls,
        broke=torch.stack(outcomes, dim=1).tolist(),
        square=fell,
        pixels=nearest.pixels,
        distance=nearest.distance,
        gradients=gradients,
        forwards=forwards,
    )


class _Nearest:
    """The nearest adversarial image of each row that was met so far: pixels [m, 3, H, W], distance [m]."""

    def __init__(self, origin: Tensor, l2: Sequence[bool]) -> None:
        self.origin, self.pixels = origin, origin.clone()
        self.l2 = torch.tensor(l2, dtype=torch.bool, device=origin.device)
        self.distance = torch.full((len(origin),), torch.inf, device=origin.device)

    def take(self, found: Adversarial, places: Tensor | slice) -> None:
        """What one attack found, on these of the rows."""
        change = found.pixels - self.origin[places]
        largest = torch.linalg.vector_norm(change, ord=torch.inf, dim=(1, 2, 3))
        distance = torch.where(self.l2[places], torch.linalg.vector_norm(change, dim=(1, 2, 3)), largest)
        nearer = found.success & (distance < self.distance[places])
        self.pixels[places] = torch.where(nearer.reshape(-1, 1, 1, 1), found.pixels, self.pixels[places])
        self.distance[places] = torch.where(nearer, distance, self.distance[places])


def checks(
    extra: Extra,
    place: int,
    settings: ProbeSettings,
    *,
    zero_share: float,
    finite: bool,
    broke: bool,
    curves: Sequence[Curve],
    nearest: float | None,
) -> tuple[Check, ...]:
    """What one row's attack looks like. broke: the verdict attack changed the answer. nearest: the smallest eps that
    did, by a search, if there was one.
    """
    tried = [*zip(extra.tried[place], extra.broke[place], strict=True), (settings.threat.eps, broke)]
    if nearest is not None:
        tried.append((nearest, True))
    return (
        Check(
            name="finite", passed=finite, said=f"logits and gradients are {'' if finite else 'not '}finite", figures={}
        ),
        Check(
            name="zero_gradients",
            passed=zero_share <= ZERO_GRADIENT_LIMIT,
            said=f"{100 * zero_share:.2f} % of the gradient's entries are exactly zero",
            figures={"share": zero_share, "limit": ZERO_GRADIENT_LIMIT},
        ),
        _rising(curves),
        Check(
            name="eps_zero",
            passed=float(extra.zero[place]) <= _SAME,
            said=f"in a ball of radius 0 logits move by {float(extra.zero[place]):.1e}",
            figures={"logit_change": float(extra.zero[place]), "limit": _SAME},
        ),
        _monotone(tried, settings.threat.norm),
        _huge(extra.tried[place][-1], extra.broke[place][-1]),
        _square(extra.square[place], settings.square_queries),
    )


def _balls(threat: ThreatModel, size: int) -> list[float]:
    """Radii to try besides the probe's own, the last so large that every image can become plain grey."""
    most = 0.5 if threat.norm == "linf" else 0.5 * math.sqrt(size)
    return [*(min(factor * threat.eps, most) for factor in SWEEP), most]


def _rising(curves: Sequence[Curve]) -> Check:
    """The loss ends above its start, for the first loss that was climbed."""
    values = curves[0].values if curves else []
    if len(values) < 2:
        return Check(name="loss_rises", passed=None, said="the first point settled it; there is no curve", figures={})
    rises = sum(later > earlier for earlier, later in itertools.pairwise(values))
    figures = {"first": values[0], "best": max(values), "rises": rises, "steps": len(values) - 1}
    return Check(
        name="loss_rises",
        passed=max(values) > values[0],
        said=f"the loss goes from {values[0]:.3g} to {max(values):.3g}, rising in {rises} of {len(values) - 1} steps",
        figures=figures,
    )


def _monotone(tried: Sequence[tuple[float, bool]], norm: Norm) -> Check:
    """What breaks a small ball lies in every larger one, too, whatever the larger one's own attack says. That attack is
    at fault only where it missed by more than SLACK. tried: eps, and whether the attack in that ball broke the answer.
    """
    own = {eps: any(broke for other, broke in tried if other == eps) for eps in sorted({eps for eps, _ in tried})}
    least = min((eps for eps, broke in own.items() if broke), default=math.inf)
    missed = [eps for eps, broke in own.items() if not broke and eps > SLACK * least]
    course = ", ".join(
        f"{eps_text(eps, norm)} {'broke' if broke else 'held' if eps < least else 'inherits that'}"
        for eps, broke in own.items()
    )
    blame = f"; the attack in {eps_text(missed[0], norm)} should have found it" if missed else ""
    return Check(
        name="monotone",
        passed=not missed,
        said=f"eps tried: {course}{blame}",
        figures={"eps": list(own), "broke": [eps >= least for eps in own], "by_own_attack": list(own.values())},
    )


def _huge(eps: float, broke: bool) -> Check:
    said = f"with eps {eps:g}, where the image can become plain grey, the answer {'breaks' if broke else 'stands'}"
    return Check(name="huge_eps", passed=broke, said=said, figures={"eps": eps})


def _square(fell: bool | None, queries: int) -> Check:
    if fell is None:
        return Check(name="square", passed=None, said="no attack without gradients was tried", figures={})
    did = "broke what they had left" if fell else "found nothing either"
    return Check(
        name="square",
        passed=not fell,
        said=f"Square, {queries} queries without gradients, {did}",
        figures={"queries": queries, "broke": fell},
    )
