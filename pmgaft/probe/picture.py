"""One picture's finding as a drawing: clean, adversarial, the amplified difference, and the answers with bars. SVG.

One file that needs nothing beside it; about as wide as a telephone, so that its words can be read there.
"""

from __future__ import annotations

import base64
import io

from PIL import Image

from pmgaft.probe import svg
from pmgaft.probe.full import Example, Finding, Question
from pmgaft.probe.settings import eps_text
from pmgaft.probe.survival import difference_picture, picture_of

WIDTH = 420.0
_PANEL, _GAP = 132.0, 12.0
_LARGEST = 224
"""Pixels of a side; larger panels are scaled down, or a thousand of them would not open."""

_ROW = 34.0
_NAME, _BAR = 150.0, 206.0
"""Where a bar begins, and how long it can be."""


def draw(finding: Finding, question: Question) -> tuple[str, float]:
    """The drawing, and its height."""
    example, norm = finding.example, question.settings.threat.norm
    panels = [("the picture", picture_of(finding.clean))]
    if example is not None:
        difference, factor = difference_picture(finding.clean, example.pixels)
        panels += [
            (f"within {eps_text(example.distance, norm)}", picture_of(example.pixels)),
            (f"the change, × {factor:.0f}", difference),
        ]
    shapes = []
    for place, (words, image) in enumerate(panels):
        x = place * (_PANEL + _GAP)
        shapes += [svg.text(x, 13, words, fill=svg.GREY, size=11.5), _image(image, x, 20)]
    if example is None:
        shapes.append(svg.text(_PANEL + _GAP, 92, "no image was found that changes the answer", fill=svg.GREY))
    top = 20 + _PANEL + 18
    for place, index in enumerate(_shown(finding, question)):
        shapes += _bars(finding.probabilities, example, index, question.labels[index], top + place * _ROW)
    height = top + _ROW * len(_shown(finding, question))
    if example is not None:
        shapes += _legend(height, finding.document["verdict"] == "broken")
        height += 20
    return svg.document(WIDTH, height, alternative(finding, question), shapes), height


def alternative(finding: Finding, question: Question) -> str:
    """What the drawing shows, for those who do not see it."""
    clean = _named(finding.probabilities, question)
    if finding.example is None:
        return f"The picture, answered {clean}"
    after = _named(finding.example.probabilities, question)
    return f"The picture, answered {clean}; the changed picture, answered {after}; the change, amplified"


def _shown(finding: Finding, question: Question) -> list[int]:
    """Labels, by position: the likeliest before and after, the likeliest before first."""
    sides = [finding.probabilities, *([finding.example.probabilities] if finding.example else [])]
    chosen = {k for side in sides for k in sorted(range(len(side)), key=lambda k: -side[k])[: question.top_k]}
    return sorted(chosen, key=lambda k: -finding.probabilities[k])


def _bars(before: list[float], example: Example | None, index: int, label: str, y: float) -> list[str]:
    shapes = [svg.text(0, y + 13, svg.shortened(label, 22), size=13)]
    sides = [(before, svg.STANDING), *([(example.probabilities, svg.BROKEN)] if example else [])]
    for place, (side, colour) in enumerate(sides):
        shapes += [
            svg.box(_NAME, y + 2 + 12 * place, _BAR, 9, "#eef1f4", round_by=2),
            svg.box(_NAME, y + 2 + 12 * place, _BAR * side[index], 9, colour, round_by=2),
            svg.text(WIDTH, y + 10.5 + 12 * place, f"{side[index]:.1%}", anchor="end", size=11),
        ]
    return shapes


def _legend(y: float, broken: bool) -> list[str]:
    after = "the changed picture" if broken else "the changed picture, which lies beyond eps"
    return [
        svg.box(0, y + 4, 10, 9, svg.STANDING, round_by=2),
        svg.text(15, y + 13, "the picture", fill=svg.GREY, size=11),
        svg.box(92, y + 4, 10, 9, svg.BROKEN, round_by=2),
        svg.text(107, y + 13, after, fill=svg.GREY, size=11),
    ]


def _image(image: Image.Image, x: float, y: float) -> str:
    if max(image.size) > _LARGEST:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    place = f'x="{x:g}" y="{y:g}" width="{_PANEL:g}" height="{_PANEL:g}"'
    return f'<image {place} preserveAspectRatio="xMidYMid" href="data:image/png;base64,{content}"/>'


def _named(probabilities: list[float], question: Question) -> str:
    best = max(range(len(probabilities)), key=lambda k: probabilities[k])
    return f"{question.labels[best]} ({probabilities[best]:.0%})"
