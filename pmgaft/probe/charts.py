"""Two drawings of a folder's rows: how many answers stand at each eps, and how the smallest eps are spread. SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pmgaft.probe import svg
from pmgaft.probe.folder import Row
from pmgaft.probe.full import Question
from pmgaft.probe.settings import eps_text
from pmgaft.probe.summary import answered, breaking_eps, rightly_answered
from pmgaft.threat import Norm

_WIDTH, _HEIGHT = 460.0, 286.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 444.0, 48.0, 218.0

_BINS_A_DOUBLING = 3
_MOST_DOUBLINGS = 12
"""Of the histogram's axis, on either side of eps; what lies beyond is counted at its end."""


def curve(rows: Sequence[Row], question: Question) -> str:
    """The share of answers that stand against eps, as the steps it really has; with true labels, accuracy, too.

    Where answers are inconclusive, a band reaches down to what would stand if all of them broke.
    """
    read, right = answered(rows), rightly_answered(rows, question)
    most = _most(read, question)
    threat = question.settings.threat
    title = "Answers that stand" if right is None else "Answers that stand, and accuracy"
    shapes = [svg.text(_LEFT, 20, f"{title}, against eps", size=14)]
    for share in (0, 25, 50, 75, 100):
        y = _height(share / 100)
        shapes += [
            svg.line(_LEFT, y, _RIGHT, y, svg.FAINT),
            svg.text(_LEFT - 6, y + 4, f"{share} %", anchor="end", fill=svg.GREY),
        ]
    for tick in _ticks(most, threat.norm):
        x = _place(tick, most)
        shapes.append(svg.text(x, _BOTTOM + 17, _number(tick, threat.norm), anchor="middle", fill=svg.GREY))
    if not read:
        return svg.document(_WIDTH, _HEIGHT, title, shapes)
    sure = [row for row in read if row.verdict != "inconclusive"]
    if len(sure) < len(read):
        upper = _steps(read, len(read), most)
        lower = _steps(sure, len(read), most)
        shapes.append(svg.path([*upper, *reversed(lower)], "none", fill="#d7e4f0"))
    shapes.append(svg.path(_steps(read, len(read), most), svg.STANDING))
    if right is not None:
        shapes.append(svg.path(_steps(right, len(read), most), svg.BROKEN, dash="6 3"))
    shapes += _mark(_place(threat.eps, most), threat.eps, threat.norm)
    legend = [("stand", svg.STANDING, "none"), *([] if right is None else [("right and stand", svg.BROKEN, "6 3")])]
    x = _LEFT
    for words, colour, dash in legend:
        shapes += [
            svg.line(x, 270, x + 22, 270, colour, width=2, dash=dash),
            svg.text(x + 28, 274, words, fill=svg.GREY),
        ]
        x += 50 + 7 * len(words)
    if len(sure) < len(read):
        shapes += [svg.box(x, 264, 22, 12, "#d7e4f0"), svg.text(x + 28, 274, "inconclusive", fill=svg.GREY)]
    shapes.append(svg.text(_RIGHT, _BOTTOM + 36, _unit(threat.norm), anchor="end", fill=svg.GREY))
    return svg.document(_WIDTH, _HEIGHT, title, shapes)


def histogram(rows: Sequence[Row], question: Question) -> str:
    """How many answers break at which smallest eps. The axis is logarithmic, eps is an edge between two bars."""
    threat = question.settings.threat
    read = answered(rows)
    known = [eps for row in read if (eps := breaking_eps(row)) is not None]
    unit = threat.eps or (1 / 255 if threat.norm == "linf" else 0.1)
    bins = Counter(_bin(eps, unit) for eps in known)
    first = min([*bins, -_BINS_A_DOUBLING]) - 1
    last = max([*bins, _BINS_A_DOUBLING]) + 1
    wide = (_RIGHT - _LEFT) / (last - first + 1)
    highest = max(bins.values(), default=1)
    title = "The smallest eps found that changes an answer"
    shapes = [svg.text(_LEFT, 20, title, size=14)]
    for count in sorted({0, math.ceil(highest / 2), highest}):
        y = _height(count / highest)
        shapes += [
            svg.line(_LEFT, y, _RIGHT, y, svg.FAINT),
            svg.text(_LEFT - 6, y + 4, str(count), anchor="end", fill=svg.GREY),
        ]
    for place, count in sorted(bins.items()):
        colour = svg.BROKEN if place < 0 else svg.STANDING
        tall = (_BOTTOM - _TOP) * count / highest
        shapes.append(svg.box(_LEFT + (place - first) * wide + 1, _BOTTOM - tall, wide - 2, tall, colour, round_by=2))
    for tick in _round_numbers(
        unit * 2 ** (first / _BINS_A_DOUBLING), unit * 2 ** ((last + 1) / _BINS_A_DOUBLING), threat.norm
    ):
        x = _LEFT + (_BINS_A_DOUBLING * math.log2(tick / unit) - first) * wide
        shapes.append(svg.text(x, _BOTTOM + 17, _number(tick, threat.norm), anchor="middle", fill=svg.GREY))
    shapes += _mark(_LEFT - first * wide, unit, threat.norm) if threat.eps else []
    without = len(read) - len(known)
    note = f"{without} of {len(read)}: none found" if without else f"{len(known)} pictures"
    shapes.append(svg.text(_LEFT, 274, note, fill=svg.GREY))
    shapes.append(svg.text(_RIGHT, _BOTTOM + 36, f"{_unit(threat.norm)}, logarithmic", anchor="end", fill=svg.GREY))
    return svg.document(_WIDTH, _HEIGHT, title, shapes)


def _most(rows: Sequence[Row], question: Question) -> float:
    """Where the curve's axis ends: not beyond where anybody looked, nor at the one picture that takes far more."""
    eps = question.settings.threat.eps
    if not question.settings.min_eps:
        return eps or 1 / 255
    known = sorted(value for row in rows if (value := breaking_eps(row)) is not None)
    common = 1.05 * known[int(0.95 * (len(known) - 1))] if known else 0.0
    return max(2 * eps, min(common, 8 * eps) if eps else common) or 1 / 255


def _steps(rows: Sequence[Row], total: int, most: float) -> list[tuple[float, float]]:
    """The corners of the share of `total` that stands, from eps 0 to the axis' end."""
    left = len(rows)
    corners = [(_LEFT, _height(left / total))]
    for eps in sorted(value for row in rows if (value := breaking_eps(row)) is not None and value <= most):
        corners.append((_place(eps, most), corners[-1][1]))
        left -= 1
        corners.append((corners[-1][0], _height(left / total)))
    return [*corners, (_RIGHT, corners[-1][1])]


def _mark(x: float, eps: float, norm: Norm) -> list[str]:
    """The probe's own eps, as an upright line."""
    at_the_end = x > _RIGHT - 80
    words = svg.text(
        x - 5 if at_the_end else x + 5, _TOP - 7, f"eps {eps_text(eps, norm)}", anchor="end" if at_the_end else "start"
    )
    return [svg.line(x, _TOP - 17, x, _BOTTOM, svg.INK, dash="2 3"), words]


def _bin(eps: float, unit: float) -> int:
    """Bars reach from above their left edge up to and with the right one; bar -1 ends at the unit."""
    limit = _BINS_A_DOUBLING * _MOST_DOUBLINGS
    if eps <= 0:
        return -limit
    return max(-limit, min(limit, math.ceil(_BINS_A_DOUBLING * math.log2(eps / unit) - 1e-9) - 1))


def _ticks(most: float, norm: Norm) -> list[float]:
    """About five round numbers from 0 on."""
    scale = 255 if norm == "linf" else 1
    rough = most * scale / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough * 0.999)
    return [turn * step / scale for turn in range(int(most * scale / step + 1e-6) + 1)]


def _round_numbers(least: float, most: float, norm: Norm) -> list[float]:
    """1, 2 and 5 times powers of ten; powers alone where these would be too many. In pixel units."""
    scale = 255 if norm == "linf" else 1
    powers = range(math.floor(math.log10(least * scale)), math.ceil(math.log10(most * scale)) + 1)
    for leading in ((1, 2, 5), (1,)):
        found = [one * 10.0**power / scale for power in powers for one in leading]
        found = [value for value in found if least <= value <= most]
        if len(found) <= 9:
            break
    return found


def _place(eps: float, most: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * min(1.0, eps / most)


def _height(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * share


def _number(eps: float, norm: Norm) -> str:
    return f"{255 * eps if norm == 'linf' else eps:.3g}"


def _unit(norm: Norm) -> str:
    return "eps, in steps of 255" if norm == "linf" else "eps, l2, pixels in [0, 1]"
