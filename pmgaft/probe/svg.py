"""Drawing in SVG: the few shapes that the probe's pictures need. Whatever is text is escaped here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from html import escape

BROKEN, STANDING, GREY, INK, FAINT = "#c8501a", "#1f6fb2", "#6b7280", "#1f2933", "#e3e6ea"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def xml_text(words: str) -> str:
    """What XML 1.0 cannot hold, escaped or not, replaced."""
    return _NOT_XML.sub("\ufffd", words)


def document(width: float, height: float, title: str, shapes: Sequence[str]) -> str:
    """A whole drawing, white below: fit for a file, and for the inside of a page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(xml_text(title))}" font-family="{FONT}" font-size="12" '
        f'fill="{INK}"><rect width="100%" height="100%" fill="#fff"/>{"".join(shapes)}</svg>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", fill: str = INK, size: float = 12) -> str:
    """One line of words; anchor: start, middle or end."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}"'
    return f"<text {place}>{escape(xml_text(words))}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = "none") -> str:
    """dash: as SVG's stroke-dasharray."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}" stroke-dasharray="{dash}"/>'


def box(x: float, y: float, width: float, height: float, colour: str, *, round_by: float = 0) -> str:
    """A filled rectangle."""
    size = f'width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="{round_by:g}" fill="{colour}"/>'


def path(points: Sequence[tuple[float, float]], colour: str, *, dash: str = "none", fill: str = "none") -> str:
    """A line through points; with `fill`, the area it surrounds."""
    course = "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    stroke = f'stroke="{colour}" stroke-width="2" stroke-linejoin="round" stroke-dasharray="{dash}"'
    return f'<path d="{course}" {stroke} fill="{fill}"/>'


def shortened(words: str, most: int) -> str:
    """With an ellipsis where it is wider than so many letters; Chinese characters and their like count twice."""
    wide = 0
    for place, letter in enumerate(words):
        wide += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if wide > most:
            return words[: place - 1] + "…"
    return words
