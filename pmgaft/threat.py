"""What an attacker may do: norm, eps, and the pixel grid both are measured on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from pmgaft.errors import ThreatError, quote

Norm = Literal["linf", "l2"]
Grid = Literal["model-input", "native"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_EPS = re.compile(rf"\s*({_NUMBER})\s*(?:/\s*({_NUMBER})\s*)?", re.ASCII)

_LONGEST = 100  # characters of an eps; matching takes time that grows with the square of the length


def parse_eps(value: str | float, norm: Norm = "linf") -> float:
    """The radius of an attack in pixel units (pixels lie in [0, 1]): "1/255", "0.0039" and 0.0039 are all understood.

    Raises: ThreatError (eps_invalid) for what is no number, for NaN, infinity, negative values, and for an linf radius
    above 1, which is nearly always a forgotten "/255".
    """
    eps = _number(value)
    if not math.isfinite(eps) or eps < 0:
        raise _eps_error(f"eps must be a number from 0 upwards, such as 1/255, not {quote(value)}")
    if norm == "linf" and eps > 1:
        hint = f"; for {value} of 255 grey levels write {str(value).strip()}/255" if "/" not in str(value) else ""
        raise _eps_error(f"eps {quote(value)} is more than the whole pixel range [0, 1]{hint}")
    return eps + 0.0  # turns -0.0 into 0.0


def format_eps(eps: float) -> str:
    """`eps` as people write it: "1/255", "0.5/255", or the plain number. `parse_eps` gives back exactly `eps`."""
    if eps == 0:
        return "0"
    text = f"{round(eps * 255, 2):g}/255"
    return text if _number(text) == eps else repr(eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreatModel:
    """An lp ball around the image, in pixel units ([0, 1]).

    grid: where the perturbation lives: on the pixels that enter the model ("model-input") or on the picture before it
    is resized ("native").
    Raises: ThreatError (norm_invalid, eps_invalid, grid_invalid).
    """

    norm: Norm = "linf"
    eps: float
    grid: Grid = "model-input"

    def __post_init__(self) -> None:
        """Refuse what no attack could mean."""
        if self.norm not in get_args(Norm):
            message = f"norm must be one of {', '.join(get_args(Norm))}, not {quote(self.norm)}"
            raise ThreatError(message, field="norm", code="norm_invalid")
        if self.grid not in get_args(Grid):
            message = f"grid must be one of {', '.join(get_args(Grid))}, not {quote(self.grid)}"
            raise ThreatError(message, field="grid", code="grid_invalid")
        parse_eps(self.eps, self.norm)

    def __str__(self) -> str:
        """Such as "linf, eps 1/255, model-input grid"."""
        return f"{self.norm}, eps {self._eps_text()}, {self.grid} grid"

    def to_json(self) -> dict[str, str | float]:
        """For results, answers and manifests: eps both as people write it and as a number."""
        return {"norm": self.norm, "eps": self._eps_text(), "eps_value": self.eps, "grid": self.grid}

    def _eps_text(self) -> str:
        return format_eps(self.eps) if self.norm == "linf" else repr(self.eps)


def _number(value: str | float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    match = _EPS.fullmatch(value) if isinstance(value, str) and len(value) <= _LONGEST else None
    if match is None:
        raise _eps_error(f"eps must be a number such as 1/255 or 0.0039, not {quote(value)}")
    numerator, denominator = float(match[1]), float(match[2] or 1)
    return numerator / denominator if denominator else math.nan


def _eps_error(message: str) -> ThreatError:
    return ThreatError(message, field="eps", code="eps_invalid")
